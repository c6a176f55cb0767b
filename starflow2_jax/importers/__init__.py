"""Converters from other people's dataset formats to ours."""
