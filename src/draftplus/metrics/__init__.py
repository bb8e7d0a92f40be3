"""Measures of generated images that no reward optimises."""
