"""Models as pure functions over nested dicts of arrays."""
