"""Adapters with which the harnesses of others evaluate a STARFlow2."""
