"""Data-parallel training: the order of samples, the loop, checkpoints."""
