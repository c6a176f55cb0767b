"""Checkpoints of runs and model folders on disk."""
