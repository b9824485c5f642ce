"""Runs of stages: their start, the lock on the output directory, and the run record."""
