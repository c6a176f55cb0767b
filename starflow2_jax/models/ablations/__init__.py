"""Alternatives to the Pretzel for the ablations; its own modules never import them."""
