"""Files that are computed from a dataset once and stored next to it, named by a hash of its inputs.

A dataset folder that cannot be written has its files in the user's cache folder.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from starflow2_jax.runtime import atomic

_CACHE = "~/.cache/starflow2_jax"


def candidate_paths(folder: str, kind: str, inputs_json: str) -> list[str]:
    """Return the files that may hold the arrays of `inputs_json`, the preferred one first."""
    name = f"{kind}-{hashlib.sha256(inputs_json.encode()).hexdigest()[:16]}.npz"
    cache = os.path.join(os.path.expanduser(_CACHE), "plans")
    return [os.path.join(parent, name) for parent in (folder, cache)]


def store(files: Sequence[str], inputs_json: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Write arrays to the first of `files` that can be written, and return it, or an empty text."""
    data = io.BytesIO()
    np.savez(data, about=inputs_json, **arrays)
    for file in files:
        try:
            atomic.write_file(file, data.getbuffer())
        except OSError as error:
            logging.warning("%s: cannot be written, so it is not stored there: %s", file, error)
        else:
            return file
    return ""


def load(file: str, names: Sequence[str]) -> tuple[str, list[np.ndarray]]:
    """Return `inputs_json` and the arrays of a file; an exception of any kind if it is damaged."""
    with np.load(file, allow_pickle=False) as stored:
        return str(stored["about"]), [stored[name] for name in names]


def to_json(inputs: Mapping[str, Any]) -> str:
    """Return the text that names a file and is stored in it."""
    return json.dumps(inputs, sort_keys=True)
