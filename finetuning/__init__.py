"""The machinery that all recipes share; it knows nothing of any one task."""
