"""Contents of output folders in a form in which two runs of a command are equal.

Times, commands and the names of Orbax's data files differ between runs and are left out.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from starflow2_jax.checkpoints import steps
from starflow2_jax.runtime import atomic

_VOLATILE_KEYS = {
    *("seconds", "time", "command", "id", "starts", "seconds_per_step", "tokens_per_second"),
    *("flops_per_second", "mfu", "start_time"),
}
_SECONDS = re.compile(r"\d+(\.\d+)? ?s\b|\d+:\d+:\d+(\.\d+)?|\b\d+(\.\d+)?(e-?\d+)? (ms|it/s)\b")
_STEP = re.compile(r"(.*checkpoints/\d+)/.*")
# They change with every start of a run.
_UNCOMPARED = ("run.json", "log.txt")


def take(folder: Path, outputs: tuple[str, ...]) -> dict[str, str]:
    """Return a digest of the contents of every file of some outputs, by name.

    A checkpoint counts as one file, whose content is its status: `print_arrays` reads its arrays.
    """
    contents: dict[str, str] = {}
    for output in outputs:
        root = folder / output
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for file in files:
            name = file.relative_to(folder).as_posix()
            if match := _STEP.match(name):
                continue_name = match[1]
                contents[continue_name] = _status(folder / continue_name)
            elif not atomic.is_partial(file.name):
                contents[name] = _digest(file)
    return contents


def leftovers(folder: Path) -> list[str]:
    """Return the names of unfinished and moved files and locks under a folder."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob(".*")
        if atomic.is_partial(path.name) or path.name.endswith((".replaced", ".lock"))
    )


def normalize(text: str) -> str:
    """Return printed text without durations, and JSON (of one or many lines) without volatile keys.

    Lines before the value of `--json` are progress.
    """
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line == "{"]
    for start in starts[:1]:
        try:
            value = json.loads("\n".join(lines[start:]))
        except ValueError:
            break
        lines[start:] = [json.dumps(value)]
    return "\n".join(map(_normalize_line, lines))


def _normalize_line(line: str) -> str:
    try:
        return json.dumps(_strip(json.loads(line)), sort_keys=True)
    except ValueError:
        return _SECONDS.sub("#", line)


def _status(step: Path) -> str:
    entries = {str(e.path): e.status for e in steps.steps(step.parent.parent)}
    return entries.get(str(step.resolve()), "absent")


def _digest(file: Path) -> str:
    data = file.read_bytes()
    if file.name in _UNCOMPARED:
        is_good = file.suffix != ".json" or _is_json(data)
        return "present" if is_good else "damaged"
    if file.suffix in (".json", ".jsonl"):
        text = data.decode("utf-8", "replace")
        try:
            text = json.dumps(_strip(json.loads(text)), sort_keys=True)
        except ValueError:
            text = normalize(text)
        data = text.encode()
    elif file.suffix == ".html":
        # Charts and tables of times differ.
        return "complete" if data.rstrip().endswith(b"</html>") else "damaged"
    return hashlib.sha256(data).hexdigest()[:16]


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strip(v) for k, v in value.items() if k not in _VOLATILE_KEYS}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def print_arrays(workdir: str) -> None:
    """Print the digest of the arrays of every committed step of a run, as JSON."""
    import jax
    import numpy as np

    from starflow2_jax.checkpoints import orbax

    digests = {}
    for entry in steps.committed(workdir):
        parts: dict[str, Any] = {}
        for info in orbax.show(workdir, entry.step):
            *path, last = info.name.split(".")
            group = parts
            for name in path:
                group = group.setdefault(name, {})
            group[last] = jax.ShapeDtypeStruct(info.shape, info.dtype)
        restored, _ = orbax.restore(workdir, entry.step, parts)
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(restored):
            digest.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).tobytes())
        digests[str(entry.step)] = digest.hexdigest()
    print(json.dumps(digests))
