"""Models: one file for each family, and what the families share."""
