"""covergenre: an album's genres from its cover, on a cluster."""

__version__ = "0.1.0"
