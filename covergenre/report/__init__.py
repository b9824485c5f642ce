"""Plots of datasets, training and metrics."""
