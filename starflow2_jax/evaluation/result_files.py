"""Result files of evaluations: their place, and the model, command and machine that they name."""

import datetime
import hashlib
import json
import shlex
import time
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from starflow2_jax.checkpoints import digest, hub, model_folder, steps
from starflow2_jax.runtime import atomic, json_text
from starflow2_jax.training.logging import run_log

COMMAND = "starflow2_jax.evaluate"
# The result in the folder of `evaluate all`.
SHAPES_FILE = "shapes.json"


class CompleteResult(Exception):
    """The same command was run before, and its result is complete."""

    def __init__(self, path: epath.Path, result: dict[str, Any]):
        super().__init__(f"{path} is complete; --overwrite replaces it")
        self.result = result


@dataclass(frozen=True)
class ResultFile:
    """The file of a result, None to write none, and the model that the result is about."""

    path: epath.Path | None
    model: dict[str, Any]
    start_time: float

    def write(self, result: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Add model, duration, command and machine to a result, and write it on process 0."""
        seconds = round(time.time() - self.start_time, 1)
        stamp = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "command": run_log.command_line(),
            **run_log.environment(),
        }
        result = {"model": self.model, **result, **stamp}
        if self.path is None:
            return result, []
        if jax.process_index() == 0:
            atomic.write_file(self.path, json.dumps(result, indent=2) + "\n")
        return result, [f"written    {self.path}"]


def open_result(
    model: str, out: str | None, name: str, data: str, *, suffix: str = ".json", overwrite: bool
) -> ResultFile:
    """Return the file `out` or, for a run, by default a file in its `evaluation/` folder.

    It is called before anything is computed, so that no computed result is refused. `name`, `data`
    and `suffix` are parts of the default name of the file. Without a suffix it is a folder.

    Raises:
        FileExistsError: The file exists, is not of this command, and may not be replaced.
        CompleteResult: The file is the result of this command.
    """
    source = describe_model(model)
    path = epath.Path(out) if out else None
    if path is None and source["step"] is not None:
        file_name = f"{name}_{source['step']:08d}_{epath.Path(data).name}{suffix}"
        path = epath.Path(source["path"]) / "evaluation" / file_name
    if path is not None and path.exists() and not overwrite:
        file = path if suffix else path / SHAPES_FILE
        result = _read_result(file) if file.exists() else {}
        if _is_result_of_this_command(result, source):
            raise CompleteResult(path, result)
        refuse_existing(path, overwrite)
    if path is not None and not suffix:
        _refuse_other_files(path)
    return ResultFile(path, source, time.time())


def _read_result(file: epath.Path) -> dict[str, Any]:
    try:
        result = json_text.decode(file.read_bytes(), str(file))
    except (ValueError, OSError):
        return {}
    return result if isinstance(result, dict) else {}


def _is_result_of_this_command(result: dict[str, Any], model: dict[str, Any]) -> bool:
    """Return True if the command that runs, not one in a script or notebook, made a result."""
    command = run_log.command_line()
    stored = result.get("model")
    is_same_model = isinstance(stored, dict) and model.items() <= stored.items()
    return COMMAND in shlex.split(command) and result.get("command") == command and is_same_model


def refuse_existing(path: epath.Path, overwrite: bool) -> None:
    """Raise FileExistsError if `path` exists and may not be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; --overwrite replaces it")


def _refuse_other_files(folder: epath.Path) -> None:
    """Raise FileExistsError for a folder with files that `evaluate all` did not write."""
    for file in folder.iterdir() if folder.exists() else ():
        if not file.name.endswith((".html", ".png", SHAPES_FILE)):
            raise FileExistsError(f"{folder} is not replaced, because it contains {file.name}")


def describe_model(path: str) -> dict[str, Any]:
    """Return path and step of a model, and the sha256 of its list of file digests."""
    folder = model_folder.locate(path)
    if model_folder.is_folder(folder):
        digests, step = epath.Path(folder) / model_folder.DIGEST_FILE, None
        path = hub.pin(path)
    else:
        workdir, step = steps.locate(path)
        checkpoint = steps.find(workdir, step)
        digests, step, path = checkpoint.path / digest.SIDECAR, checkpoint.step, str(workdir)
    sha256 = hashlib.sha256(digests.read_bytes()).hexdigest() if digests.exists() else None
    return {"path": path, "step": step, "weights": "averaged", "sha256": sha256}
