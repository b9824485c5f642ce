"""The four stages: prepare, train, evaluate, score. None imports another."""
