"""Output directories: which run owns one, and which process is writing to it."""
