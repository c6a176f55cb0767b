"""Comparison with the golden arrays of the published code."""

import numpy as np


def error(values, reference) -> float:
    """Return max |values - reference| relative to max(1, max |reference|)."""
    reference = np.asarray(reference, np.float64)
    difference = np.abs(np.asarray(values, np.float64) - reference).max()
    return float(difference / max(1.0, np.abs(reference).max()))


def check_all(values, golden, prefix, tolerance):
    """Compare every golden key that starts with `prefix`; each needs a value.

    Args:
        values: arrays by the rest of the key.
        golden: the open file of golden arrays.
        prefix: the start of the keys.
        tolerance: function of the rest of the key.
    """
    keys = [k.removeprefix(prefix) for k in golden.files if k.startswith(prefix)]
    missing = [k for k in keys if k not in values]
    assert keys and not missing, f"{prefix}: not computed: {missing}"
    for key in keys:
        reference = golden[prefix + key]
        shape = np.shape(values[key])
        assert shape == reference.shape, (key, shape, reference.shape)
        difference, limit = error(values[key], reference), tolerance(key)
        assert difference <= limit, f"{prefix}{key}: off by {difference:.2e} > {limit:.0e}"
