"""Files of evaluation results: their place, and the model, data and machine that they name."""

import hashlib
import json
import time
from typing import Any

import jax
from etils import epath

from starflow2_jax.checkpoints import digest, model_folder, steps
from starflow2_jax.data import manifest
from starflow2_jax.training.logging import run_log


def describe_model(path: str) -> dict[str, Any]:
    """Return path and step of a model, and the sha256 of its list of file digests."""
    folder = model_folder.locate(path)
    if model_folder.is_folder(folder):
        digests, step = epath.Path(folder) / model_folder.DIGEST_FILE, None
    else:
        workdir, step = steps.locate(path)
        checkpoint = steps.find(workdir, step)
        digests, step, path = checkpoint.path / digest.SIDECAR, checkpoint.step, str(workdir)
    sha256 = hashlib.sha256(digests.read_bytes()).hexdigest() if digests.exists() else None
    return {"path": path, "step": step, "weights": "averaged", "sha256": sha256}


def fingerprint(folder: str) -> str:
    """Return the fingerprint of a dataset folder."""
    return manifest.fingerprint(manifest.load(folder))


def output_path(
    out: str | None, model: dict[str, Any], name: str, data: str, suffix: str, overwrite: bool
) -> epath.Path | None:
    """Return where a result goes: `out`, or a file in the run's `evaluation/`, or None.

    It is called before anything is computed, so that no computed result is refused.

    Args:
        model: as from `describe_model`.
        name, data, suffix: give the name of a file in the run's folder.

    Raises:
        FileExistsError: the path exists and `overwrite` is false.
    """
    if not out and model["step"] is not None:
        file = f"{name}_{model['step']:08d}_{epath.Path(data).name}{suffix}"
        out = epath.Path(model["path"]) / "evaluation" / file
    if not out:
        return None
    refuse_existing(epath.Path(out), overwrite)
    return epath.Path(out)


def refuse_existing(path: epath.Path, overwrite: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; --overwrite replaces it")


def write(
    result: dict[str, Any], out: epath.Path | None, start_time: float
) -> tuple[dict[str, Any], list[str]]:
    """Stamp a result with duration, command and machine, and write it as JSON on process 0.

    Returns:
        The stamped result, and a line that names the file, if there is one.
    """
    result = {
        **result,
        "seconds": round(time.time() - start_time, 1),
        "command": run_log.command_line(),
        **run_log.environment(),
    }
    if out is None:
        return result, []
    if jax.process_index() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result, [f"written    {out}"]
