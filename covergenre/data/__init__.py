"""Catalogs, covers and datasets: from rows of a table to encoded covers on disk."""
