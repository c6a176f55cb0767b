"""The readers of weights, configurations, tokenizers, run records and messages of processes."""

import functools
import importlib.util
import json
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from soak import tiny_experiment
from soak.fuzz_trials import NAME, Reader
from soak.mutations import TOKENS, change_bytes, change_value, changed_json
from starflow2_jax import config
from starflow2_jax.checkpoints import model_folder, tensor_files
from starflow2_jax.checkpoints.convert import starflow
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.data import chat_template
from starflow2_jax.inference import output
from starflow2_jax.models.flow import declare
from starflow2_jax.runtime import folder_lock, rendezvous
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.tasks import flow

_TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.zeros((), np.int32),
    "c": np.ones(5, np.float16),
}


# ------------------------------------------------------------------------------------------ weights


def _make_safetensors(rng: random.Random, folder: Path) -> Path | None:
    tensors = tensor_files.open_source(_TENSORS)
    data = b"".join(bytes(part) for part in model_folder.safetensors_parts(tensors))
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = changed_json(json.loads(data[8 : 8 + size]), rng)
        if header is None:
            return None
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = change_bytes(data, rng)
    path = folder / f"{NAME}.safetensors"
    path.write_bytes(data)
    return path


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: stored.read() for name, stored in tensor_files.open_source(path).items()}


def _tensors_problem(tensors: dict[str, np.ndarray]) -> str:
    size = sum(array.nbytes for array in tensors.values())
    return f"{size} bytes of tensors" if size > 1000 else ""


def _make_index(rng: random.Random, folder: Path) -> Path | None:
    root = folder / f"{NAME}_model"
    tree = {"a": {"weight": _TENSORS["a.weight"]}, "c": _TENSORS["c"]}
    model_folder.write_folder(root, tree, {}, shard_bytes=40)
    file = root / rng.choice((tensor_files.INDEX_FILE, model_folder.DIGEST_FILE))
    data = changed_json(json.loads(file.read_text()), rng)
    if data is None:
        return None
    file.write_bytes(data)
    return root


def _read_model(root: Path) -> dict[str, np.ndarray]:
    model_folder.read_digests(root)
    model_folder.check(root)
    return _read_tensors(root)


# ----------------------------------------------------------------------------------- configurations


def _make_config(rng: random.Random, folder: Path) -> dict[str, Any] | None:
    cfg = change_value(config.to_dict(tiny_experiment.get_config()), rng)
    return cfg if isinstance(cfg, dict) else None


def _read_config(cfg: dict[str, Any]) -> dict[str, Any]:
    config.check(cfg)
    declare(flow.model_config(cfg))
    return cfg


def _config_problem(cfg: dict[str, Any]) -> str:
    try:
        json.dumps(cfg, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        return f"not JSON: {error}"
    return ""


def _make_overrides(rng: random.Random, folder: Path) -> list[str]:
    names = [*config.KEYS, "model.width", "model.layers", "model.unknown", "name", "modle.width"]
    values = ("", "1e999", "nan", "-1", "0", "[", "(1,", "None", "True", "{}", "9" * 30, "'", "a,b",
              "\x00", "1", "(8, 8)", "../..", "ü", "__import__('os')")  # fmt: skip
    return [
        f"--config.{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.choice((1, 1, 2)))
    ]


def _read_overrides(arguments: list[str]) -> dict[str, Any]:
    """Parse a command line as `train` does."""
    from ml_collections import config_flags

    from starflow2_jax.runtime import cli

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    argv = [
        cli.quote_keywords(a) for a in ["x", f"--config={tiny_experiment.__file__}", *arguments]
    ]
    sys.argv[:] = argv  # config_flags looks for the keys there
    try:
        values(argv)
    except flags.Error as error:
        raise ValueError(f"config: {error}") from error
    except (AttributeError, KeyError) as error:
        problem = cli.explain(argv, error)
        if not problem:
            raise
        raise ValueError(problem) from error
    return _read_config(config.to_dict(values.config))


def _make_model_config(rng: random.Random, folder: Path) -> Path | None:
    root = folder / f"{NAME}_model"
    cfg = config.to_dict(tiny_experiment.get_config())
    model_folder.write_folder(root, {"a": _TENSORS["c"]}, cfg)
    data = changed_json(cfg, rng)
    if data is None:
        return None
    (root / model_folder.CONFIG_FILE).write_bytes(data)
    return root


def _read_model_config(root: Path) -> dict[str, Any]:
    """Open a folder without digests, which would find every change."""
    (root / model_folder.DIGEST_FILE).unlink()
    saved = open_model(root)
    try:
        return _read_config(saved.config)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from error


def _make_options(rng: random.Random, folder: Path) -> Path | None:
    values = {"img_size": 32, "patch_size": 4, "channels": 64, "blocks": 2, "layers_per_block": 2}
    if rng.random() < 0.5:
        values = change_value(values, rng)
    path = folder / f"{NAME}.yaml"
    try:
        text = json.dumps(values) if isinstance(values, dict) else str(values)
        if rng.random() < 0.3:
            text = " ".join(f"{k}={v}" for k, v in dict(values).items())
    except (TypeError, ValueError):
        return None
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(change_bytes(data, rng) if rng.random() < 0.7 else data)
    return path


def _read_options(path: Path) -> Any:
    return starflow.describe(tensor_files.open_source(_TENSORS), path)


# ------------------------------------------------------------------------------------------ records


def _make_run(rng: random.Random, folder: Path) -> Path | None:
    root = folder / f"{NAME}_run"
    root.mkdir()
    log = run_log.open(epath.Path(root), tiny_experiment.get_config())
    run_log.write_row(log, 1, {"loss": 1.0})
    run_log.close(log)
    file = root / rng.choice((run_log.CONFIG, run_log.RUN, run_log.METRICS))
    lines = file.read_text().splitlines() if file.name == run_log.METRICS else [file.read_text()]
    data = changed_json(json.loads(lines[0]), rng)
    if data is None:
        return None
    file.write_bytes(data + b"\n")
    return root


def _read_run(root: Path) -> Any:
    return run_log.read_config(root), run_log.read_run(root), run_log.read_rows(root)


def _make_lock(rng: random.Random, folder: Path) -> Path | None:
    data = changed_json({"pid": 1, "host": "x", "start": "a b", "id": "c"}, rng)
    if data is None:
        return None
    root = folder / f"{NAME}_run"
    root.mkdir()
    (root / folder_lock.FILE).write_bytes(data)
    (root / output.JOB_FILE).write_bytes(data)
    return root


def _read_lock(root: Path) -> None:
    output.read_job(epath.Path(root))
    with folder_lock.lock(root, "soaks"):
        pass


def _make_message(rng: random.Random, folder: Path) -> bytes:
    value = {"nonce": "a", "process": 1, "processes": 2, "host": "x", "proof": "b"}
    data = changed_json(value, rng)
    return (b"\xff" if data is None else data) + rng.choice((b"\n", b"", b"\n\n", b"\r\n"))


def _read_message(data: bytes) -> Any:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data[:60_000])
        far.shutdown(socket.SHUT_WR)
        connection = rendezvous.Connection(NAME, near)
        message = rendezvous.receive(connection, time.monotonic() + 5)
        info = rendezvous.ProcessInfo("127.0.0.1:1", 2, 0, None, NAME)
        newcomer = rendezvous.Connection("", near, buffer=bytearray(data))
        connections: dict[int, rendezvous.Connection] = {}
        rendezvous._introduce(info, connections, newcomer)
        return message, connections


def _message_problem(value: Any) -> str:
    message, connections = value
    if connections:
        return "a stranger was let in"
    texts = [v for v in (message or {}).values() if isinstance(v, str)]
    return "" if all(text.isprintable() for text in texts) else "control characters"


# ------------------------------------------------------------------------- tokenizers and templates

_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
_HOSTILE = (
    "{% for a in range(10**9) %}{{ a }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 'x' * 10**10 }}",
    "{{ messages | tojson | length ** 10 ** 9 }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


def _make_template(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.2:
        return rng.choice(_HOSTILE)
    return change_bytes(_TEMPLATE.encode(), rng).decode("utf-8", "replace")


def _make_tokenizer(rng: random.Random, folder: Path) -> Path | None:
    from starflow2_jax.data import tokenizer

    root = folder / f"{NAME}_words"
    tokenizer.write(_trained_tokenizer(), root, patch=4, merge=2, frames=2)
    file = rng.choice(sorted(root.iterdir()))
    data = changed_json(json.loads(file.read_text()), rng)
    if data is None:
        return None
    file.write_bytes(data)
    return root


@functools.cache
def _trained_tokenizer() -> str:
    from starflow2_jax.data import records, tokenizer
    from starflow2_jax.shapes import generator

    with tempfile.TemporaryDirectory() as folder:
        rows = generator.make_records(0, 4, 16, tags=("single_object",))
        records.write(f"{folder}/data", rows)
        return tokenizer.train(f"{folder}/data", 300)


def _read_tokenizer(root: Path) -> Any:
    from starflow2_jax.data.chat_layout import open_tokenizer

    opened = open_tokenizer(root, 1000)
    return [opened.encode(text.decode("utf-8", "replace")) for text in TOKENS[:8]]


# ------------------------------------------------------------------------------- PyTorch and flags


class _Code:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("/tmp/soak_ran_code"),)


def _make_torch(rng: random.Random, folder: Path) -> Path | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    state: dict[Any, Any] = {name: torch.from_numpy(a) for name, a in _TENSORS.items()}
    kind = rng.random()
    if kind < 0.1:
        state["a.weight"] = _Code()
    elif kind < 0.3:
        state = change_value({"a": 1, "b": [torch.zeros(2)]}, rng)
    path = folder / f"{NAME}.pth"
    try:
        torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    except Exception:  # no file holds such values
        return None
    if kind > 0.4:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
    return path


def _torch_problem(tensors: dict[str, np.ndarray]) -> str:
    file = Path("/tmp/soak_ran_code")
    if file.exists():
        file.unlink()
        return "code of the file ran"
    return ""


_NUMBERS = ("", "nan", "inf", "-1", "0", "1e999", "9" * 25, "0x10", "1.5", "\x00", "ü", "True", "7")
_COMMANDS = ("bench", "convert", "evaluate", "generate", "prepare")


def _make_flags(rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    command = rng.choice(_COMMANDS)
    names = list(_flags_of(command))
    chosen = [rng.choice(names) for _ in range(rng.choice((1, 1, 2, 4)))]
    return command, [f"--{name}={rng.choice(_NUMBERS)}" for name in chosen]


def _flags_of(command: str) -> flags.FlagValues:
    values = flags.FlagValues()
    importlib.import_module(f"starflow2_jax.{command}").define(values)
    return values


def _read_flags(value: tuple[str, list[str]]) -> dict[str, Any]:
    command, arguments = value
    values = _flags_of(command)
    try:
        values([command, *arguments])
    except flags.Error as error:
        raise ValueError(str(error)) from error
    return values.flag_values_dict()


def _flags_problem(values: dict[str, Any]) -> str:
    numbers = {n: v for n, v in values.items() if isinstance(v, float)}
    infinite = [name for name, value in numbers.items() if not np.isfinite(value)]
    return f"{infinite} are not finite" if infinite else ""


_KEY = r"config|model\."  # an error names the key
READERS = (
    Reader("torch files", _make_torch, _read_tensors, _torch_problem, 40),
    Reader("flags", _make_flags, _read_flags, _flags_problem, 60, "--"),
    Reader("safetensors", _make_safetensors, _read_tensors, _tensors_problem, 150),
    Reader("model indexes", _make_index, _read_model, _tensors_problem, 60),
    Reader("configurations", _make_config, _read_config, _config_problem, 100, _KEY),
    Reader("overrides", _make_overrides, _read_overrides, _config_problem, 30, _KEY),
    Reader("model configs", _make_model_config, _read_model_config, _config_problem, 60),
    Reader("options", _make_options, _read_options, cases=100, mark="options"),
    Reader("run records", _make_run, _read_run, cases=60),
    Reader("locks", _make_lock, _read_lock, cases=60),
    Reader("messages", _make_message, _read_message, _message_problem, 150),
    Reader("templates", _make_template, lambda t: chat_template.opening(NAME, t, {}), cases=8),
    Reader("tokenizers", _make_tokenizer, _read_tokenizer, cases=20),
)
