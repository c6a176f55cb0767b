"""Result files of evaluations: their place, and the model, command and machine that they name."""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from starflow2_jax.checkpoints import digest, model_folder, steps
from starflow2_jax.training.logging import run_log


@dataclass(frozen=True)
class ResultFile:
    """The file of a result, None to write none, and the model that the result is about."""

    path: epath.Path | None
    model: dict[str, Any]
    start_time: float

    def write(self, result: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Add model, duration, command and machine to a result, and write it on process 0."""
        seconds = round(time.time() - self.start_time, 1)
        stamp = {"seconds": seconds, "command": run_log.command_line(), **run_log.environment()}
        result = {"model": self.model, **result, **stamp}
        if self.path is None:
            return result, []
        if jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(result, indent=2) + "\n")
        return result, [f"written    {self.path}"]


def open_result(
    model: str, out: str | None, name: str, data: str, *, suffix: str = ".json", overwrite: bool
) -> ResultFile:
    """Return the file `out` or, for a run, by default a file in its `evaluation/` folder.

    It is called before anything is computed, so that no computed result is refused. `name`, `data`
    and `suffix` are parts of the default name of the file.
    """
    source = _describe_model(model)
    path = epath.Path(out) if out else None
    if path is None and source["step"] is not None:
        file_name = f"{name}_{source['step']:08d}_{epath.Path(data).name}{suffix}"
        path = epath.Path(source["path"]) / "evaluation" / file_name
    if path is not None:
        refuse_existing(path, overwrite)
    return ResultFile(path, source, time.time())


def refuse_existing(path: epath.Path, overwrite: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; --overwrite replaces it")


def _describe_model(path: str) -> dict[str, Any]:
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
