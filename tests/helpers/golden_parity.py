"""Ours beside the golden arrays: every stored key of a prefix is computed and compared."""

import numpy as np


def error(ours, reference) -> float:
    """max |ours - reference| relative to max(1, max |reference|)."""
    reference = np.asarray(reference, np.float64)
    difference = np.abs(np.asarray(ours, np.float64) - reference).max()
    return float(difference / max(1.0, np.abs(reference).max()))


def check_all(ours, golden, prefix, tolerance):
    """Compare every key below `prefix`; one without a value of ours fails.

    Args:
        ours: key below the prefix -> array; tolerance: function of the key.
    """
    keys = [k.removeprefix(prefix) for k in golden.files if k.startswith(prefix)]
    missing = [k for k in keys if k not in ours]
    assert keys and not missing, f"{prefix}: not computed: {missing}"
    for key in keys:
        reference = golden[prefix + key]
        assert np.shape(ours[key]) == reference.shape, (key, np.shape(ours[key]), reference.shape)
        off = error(ours[key], reference)
        assert off <= tolerance(key), f"{prefix}{key}: off by {off:.2e} > {tolerance(key):.0e}"
