"""Training: Trainer with our parameter groups, checkpoints, what a run depends on, and what is done with its model."""
