"""Rivals of the Pretzel, which only models/backbone.py imports."""
