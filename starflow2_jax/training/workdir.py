"""Check that a workdir can be resumed by a configuration and its data."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from starflow2_jax import config
from starflow2_jax.checkpoints import hub, orbax, steps
from starflow2_jax.runtime import atomic, distributed
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.run_data import RunData, fingerprints

# Keys that may change when a run is resumed: they affect placement and logging, not the result. The
# contents of frozen models are compared instead of their paths.
RESUMABLE_KEYS = (
    *("layout", "frozen_layout", "mesh", "attention", "log.", "checkpoint."),
    *("data.threads", "eval_data.threads"),
    *("distributed.", "teacher.path", "init.fae", "fae.path", "fae.lpips", "vlm.path"),
)
# These may change as well if the data are the same.
DATA_PATH_KEYS = ("data.path", "data.latents", "data.features", "data.mixture", "eval_data.")
# Keys that name a folder or file of another model.
MODEL_PATH_KEYS = (
    *("vlm.path", "fae.path", "fae.lpips", "teacher.path", "text.tokenizer"),
    *("init.from", "init.fae"),
)


def check_path(workdir: epath.Path) -> None:
    """Raise ValueError if checkpoints cannot be written to a workdir, or not be read again."""
    path = str(workdir) if atomic.is_remote(workdir) else os.path.abspath(workdir)
    if problem := steps.pattern_problem(path):
        raise ValueError(f"--workdir {path}: {problem}")
    if atomic.is_remote(path):
        return
    existing = pathlib.Path(path)
    while not existing.exists():
        if existing.is_symlink():
            raise ValueError(f"--workdir {path}: {existing} is a link to nothing")
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"--workdir {path}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"--workdir {path}: {existing} cannot be written")


def pin_models(cfg: Mapping[str, Any], workdir: epath.PathLike | None) -> dict[str, Any]:
    """Return a configuration whose addresses of the Hugging Face Hub name commits.

    A run that is resumed keeps the commits in its records, whatever the Hub has by then, unless the
    command names another repository, folder or commit.
    """
    pinned = config.to_dict(cfg)
    keys = [key.split(".") for key in MODEL_PATH_KEYS]
    addresses = [(group, name) for group, name in keys if hub.is_address(pinned[group][name])]
    stored = run_log.read_config(workdir) if workdir and addresses else None
    for group, name in addresses:
        path, recorded = pinned[group][name], (stored or {}).get(group, {}).get(name) or ""
        is_same = hub.is_address(recorded) and hub.is_same_model(path, recorded)
        pinned[group][name] = recorded if is_same else hub.pin(path)
    return pinned


def check_workdir(workdir: epath.Path, cfg: Mapping[str, Any], data: RunData) -> int | None:
    """Return the step to resume from, None in a new workdir; check configuration and data."""
    newest_step = steps.latest(workdir)
    distributed.assert_equal_across_processes(
        f"what they see in {workdir}", {"newest step": newest_step}
    )
    steps.check_copied(workdir)
    meta = orbax.read_meta(workdir) if newest_step is not None else {}
    saved = read_records(workdir, meta)
    if saved is None:
        return newest_step
    saved_data = newest_step is not None and fingerprints(meta["data"])
    same_data = saved_data == data.fingerprints
    may_change = RESUMABLE_KEYS + (DATA_PATH_KEYS if same_data else ())
    differing = [row for row in config.differences(saved, cfg) if not row.startswith(may_change)]
    if differing:
        raise ValueError(
            f"{workdir} holds another configuration:\n  " + "\n  ".join(differing) + "\nto go on "
            "from its weights, train in another --workdir with --config.init.from set to this one"
        )
    if newest_step is not None and not same_data:
        raise ValueError(
            f"{workdir}: the data have changed since step {newest_step}: fingerprints {saved_data} "
            f"then, {data.fingerprints} now"
        )
    return newest_step


def read_records(workdir: epath.Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of a run, after checking its files against a checkpoint's `meta`.

    Args:
        meta: of the newest checkpoint; empty if there is none.

    Returns:
        `config.json`, or the configuration in `meta` if that file is missing; None if both are.

    Raises:
        ValueError: `config.json`, `run.json` or `metrics.jsonl` is not what was written.
    """
    saved, trained = run_log.read_config(workdir), meta.get("config")
    run_log.check_metrics(workdir, meta)
    if saved is None and trained is not None:
        file = workdir / run_log.CONFIG
        logging.warning("%s is missing: taking the configuration of the newest checkpoint", file)
        return dict(trained)
    # Paths of data and placement may have changed since the checkpoint.
    may_change = RESUMABLE_KEYS + DATA_PATH_KEYS
    differing = [
        row
        for row in (config.differences(trained, saved) if trained and saved else ())
        if not row.startswith(may_change)
    ]
    if differing:
        raise ValueError(
            f"{workdir / run_log.CONFIG} is not the configuration of the newest checkpoint; move "
            "it away, and that one is taken:\n  " + "\n  ".join(differing)
        )
    return saved
