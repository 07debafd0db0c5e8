"""Pretrained models adapted to tasks, by adapters of equal size, full fine-tuning or a new head alone."""
