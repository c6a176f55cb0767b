"""Datasets: schema, shards, manifests, importers, the shapes world, the input pipeline."""
