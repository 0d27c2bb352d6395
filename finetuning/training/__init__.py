"""Training: loading, LoRA, the Trainer and its callbacks, checkpoints, what a run is known by."""
