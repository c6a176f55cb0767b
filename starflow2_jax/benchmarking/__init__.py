"""Timing of training, sampling and data."""
