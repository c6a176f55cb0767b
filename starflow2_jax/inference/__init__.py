"""Sampling, interleaved generation and scoring."""
