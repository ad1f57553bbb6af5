"""Restoring many files: the parts that need no Ray."""
