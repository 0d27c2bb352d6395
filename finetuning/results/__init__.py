"""What comes out: answers, scores, report."""
