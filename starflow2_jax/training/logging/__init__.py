"""Metrics, trackers, throughput and sample grids of a run."""
