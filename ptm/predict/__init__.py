"""A model asked line by line: JSON lines in, JSON lines out."""
