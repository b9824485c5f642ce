"""Runs of stages: their start, the lock on the output directory, and the record of whose it is."""
