"""Rivals of the Pretzel, which its main path never imports."""
