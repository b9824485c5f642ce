"""A catalog of synthetic covers, and all four stages on it."""
