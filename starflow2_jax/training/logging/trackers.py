"""Send a run's metrics and images to TensorBoard, Weights & Biases and trackio.

Each tracker is opened once, by process 0, and imported only if `log.trackers` names it.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from starflow2_jax.config import nearest
from starflow2_jax.runtime import atomic


class Tracker(NamedTuple):
    """A destination of metrics and of images uint8 [H, W, 3]."""

    name: str
    scalars: Callable[[int, Mapping[str, float]], None]
    image: Callable[[int, str, np.ndarray], None]
    end: Callable[[], None]


def open_trackers(
    names: Sequence[str],
    workdir: epath.PathLike,
    *,
    project: str,
    run_id: str,
    step: int,
    config: Mapping[str, Any],
) -> list[Tracker]:
    """Open the trackers in `names`.

    Args:
        project: groups runs in wandb and trackio.
        run_id: stays the same when a run is resumed.
        step: the step from which the run continues; later rows of an earlier start are superseded.
    """
    check(names)
    workdir, trackers = epath.Path(workdir), []
    for name in names:
        try:
            trackers.append(_OPEN[name](workdir, project, run_id, step, dict(config)))
        except Exception as error:  # of any kind: each tracker has its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"config: log.trackers: {name} cannot be opened: {reason}") from error
    return trackers


def check(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is unknown, not installed, or without its key."""
    for name in names:
        if name not in _OPEN:
            raise ValueError(
                f"config: log.trackers names {name!r}, which is not one of {', '.join(_OPEN)}"
                f"{nearest(name, _OPEN)}"
            )
        _package(name, _PACKAGES[name])
    is_online = os.environ.get("WANDB_MODE", "online") in ("online", "run", "shared")
    if "wandb" in names and is_online:
        api = getattr(_package("wandb", "wandb"), "api", None)
        if api is not None and not api.api_key:
            raise ValueError(
                "config: log.trackers names 'wandb', but there is no key for it: run "
                "`wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
            )


def _package(tracker: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"config: log.trackers names {tracker!r}, but its package {package} cannot be imported "
            f"({error}); pip install 'starflow2_jax[{tracker}]'"
        ) from error


def _tensorboard(workdir, project, run_id, step, config) -> Tracker:
    del project, run_id
    writer = _package("tensorboard", "tensorboardX").SummaryWriter(
        str(workdir / "tensorboard"), purge_step=step + 1 if step else None
    )
    text = "\n".join(f"    {name}: {value}" for name, value in config.items())
    writer.add_text("config", text, step)

    def scalars(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def image(step, name, pixels):
        writer.add_image(name, pixels, step, dataformats="HWC")
        writer.flush()

    return Tracker("tensorboard", scalars, image, writer.close)


def _wandb(workdir, project, run_id, step, config) -> Tracker:
    del step
    wandb = _package("wandb", "wandb")
    local = None if atomic.is_remote(workdir) else str(workdir)
    run = wandb.init(
        project=project, name=workdir.name, id=run_id, resume="allow", config=config, dir=local
    )
    # An explicit step column: wandb drops rows whose internal step decreases, as on a resume.
    run.define_metric("*", step_metric="step")

    def image(step, name, pixels):
        run.log({"step": step, name: wandb.Image(pixels)})

    return Tracker(
        "wandb", lambda step, values: run.log({**values, "step": step}), image, run.finish
    )


def _trackio(workdir, project, run_id, step, config) -> Tracker:
    del step
    trackio = _package("trackio", "trackio")
    # trackio resumes a run by its name, and folders of several projects may have the same name.
    name = f"{workdir.name}-{run_id}"
    run = trackio.init(project=project, name=name, config=config, resume="allow", embed=False)

    def image(step, name, pixels):
        run.log({name: trackio.Image(pixels)}, step=step)

    return Tracker(
        "trackio", lambda step, values: run.log(dict(values), step=step), image, run.finish
    )


_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
