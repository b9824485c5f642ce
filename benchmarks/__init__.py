"""Speed as ratios in one run, and the floors that a model has to beat. Not part of the package."""
