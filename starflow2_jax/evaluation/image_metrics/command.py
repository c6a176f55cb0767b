"""The verb `images` of `evaluate`."""

import time
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.evaluation import result_files
from starflow2_jax.evaluation.command_flags import (
    Output,
    describe_data,
    load_starflow2,
    open_result,
    require,
)
from starflow2_jax.evaluation.image_metrics import adm_npz, metrics, networks, samples
from starflow2_jax.evaluation.result_files import ResultFile
from starflow2_jax.inference import load
from starflow2_jax.inference.flow_sampler import load_flow
from starflow2_jax.mesh import make_mesh


def evaluate_images(values: flags.FlagValues) -> Output:
    """Measure how far a model's images are from those of a dataset, and write both as `.npz`."""
    require(values, "images", "data")
    if bool(values.model) == bool(values.images):
        raise ValueError("images: one of --model and --images is needed")
    file = _open_file(values)
    inception = networks.open_inception(values.inception) if values.inception else None
    clip = networks.open_clip(values.clip) if values.clip else None
    generated, real, options = _draw_images(values)
    captions = real.captions if len(generated) == len(real.images) else None
    figures, not_run = metrics.measure(
        generated, real.images, captions, inception=inception, clip=clip
    )
    result = {
        "data": {**describe_data(values.data), "images": len(real.images)},
        "metrics": figures,
        "not_run": not_run,
        "options": options,
        "protocol": metrics.protocol(values.inception, values.clip),
    }
    lines = list(samples.summary_lines(result))
    if file.path:
        for name, pixels in (("generated", generated), ("real", real.images)):
            npz = file.path.with_name(f"{file.path.stem}_{name}.npz")
            adm_npz.write(npz, [pixels], len(pixels))
            lines.append(f"written    {npz}")
    result, written = file.write(result)
    return result, [*lines, *written]


def _open_file(values: flags.FlagValues) -> ResultFile:
    if values.model:
        return open_result(values, "images", values.data)
    path = epath.Path(values.out) if values.out else None
    if path:
        result_files.refuse_existing(path, values.overwrite)
    return ResultFile(path, {"path": values.images}, time.time())


def _draw_images(
    values: flags.FlagValues,
) -> tuple[np.ndarray, samples.RealImages, dict[str, Any]]:
    """Return generated images, those of the data, and the options that the former depend on."""
    if values.images:
        generated = samples.read_images(values.images)
        return generated, samples.read_real(values.data, values.rows, generated.shape[1]), {}
    if open_model(values.model).task == load.TASK:
        model = load_starflow2(values)
    else:
        model = load_flow(values.model, make_mesh(values.mesh), values.layout)
    return samples.draw(
        model,
        values.data,
        fae=values.fae,
        rows=values.rows,
        batch_size=values.batch_size or 96,
        seed=values["seed"].value,
        guidance=values.guidance,
        image_temperature=values.image_temperature,
    )
