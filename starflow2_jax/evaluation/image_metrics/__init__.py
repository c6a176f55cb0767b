"""Distances between generated and real images, from features of other networks."""
