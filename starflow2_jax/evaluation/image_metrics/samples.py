"""Images of a model for the records of a dataset, and the records' own images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import images, records
from starflow2_jax.data.records import Record, Text
from starflow2_jax.evaluation import ask
from starflow2_jax.evaluation.image_metrics import adm_npz
from starflow2_jax.inference import flow_sampler
from starflow2_jax.inference.flow_sampler import FlowModel, FlowSampling
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import sampling_defaults
from starflow2_jax.latents import codec as latent_codec

PNG_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class RealImages(NamedTuple):
    """The target images of a dataset's records, with what a model draws them from."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    prompts: list[list[Any]]  # texts and images of the user
    captions: list[str] | None  # None if no record has text
    labels: list[int] | None  # class numbers, None if some record has none


def read_real(path: str, count: int | None, pixels: int) -> RealImages:
    """Read the first `count` records with one target image, as squares of `pixels`."""
    rows, targets, dataset = [], [], records.read(path)
    for index, record in enumerate(dataset):
        if count is not None and len(rows) == count:
            break
        location = dataset.location(index)
        image = records.target_image(record, location)
        targets.append(images.center_crop(image, pixels))
        rows.append((record, location))
    if not rows:
        raise ValueError(f"{path}: there are no records")
    captions = [_caption(record) for record, _ in rows]
    labels = [record.meta.get("label") for record, _ in rows]
    return RealImages(
        np.stack(targets),
        [_prompt(*row) for row in rows],
        captions if any(captions) else None,
        [int(label) for label in labels] if None not in labels else None,
    )


def _caption(record: Record) -> str:
    return " ".join(s.s for s in record.segs if isinstance(s, Text) and not s.loss)


def _prompt(record: Record, location: str) -> list[Any]:
    """Return what the user gives: texts, and images uint8 [H, W, 3]."""
    return [
        segment.s
        if isinstance(segment, Text)
        else images.decode(record.imgs[segment.i].data, location)
        for segment in record.segs
        if not segment.loss
    ]


def read_images(path: str) -> np.ndarray:
    """Return the images of an `.npz` of `adm_npz`, or of a folder of images of one size.

    Images of a folder are in the order of their names.
    """
    if not Path(path).is_dir():
        return adm_npz.read(path)
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix in PNG_SUFFIXES]
    if not files:
        raise ValueError(f"{path}: there are no images in this folder")
    rows = [images.decode(file.read_bytes(), str(file)) for file in files]
    for file, row in zip(files, rows):
        if row.shape != rows[0].shape:
            raise ValueError(f"{file}: {row.shape[:2]}, but {files[0].name} {rows[0].shape[:2]}")
    return np.stack(rows)


def draw(
    model: Model | FlowModel,
    data: str,
    *,
    fae: str | None = None,
    rows: int | None = None,
    batch_size: int = 96,
    seed: int = 0,
    guidance: float | None = None,
    image_temperature: float | None = None,
) -> tuple[np.ndarray, RealImages, dict[str, Any]]:
    """Return one image, uint8 [N, H, W, 3], for every record, the records', and the options.

    Args:
        model: a STARFlow2, or a flow of pixels or of latents.
        data: a dataset folder, of which the first `rows` records are used.
        fae: folder of a flow's codec, if it is not where the run's configuration says.
        batch_size: upper bound on the images of a batch.
        seed: of the noise; image i depends on it and on i alone.
        guidance: weight; None is the run's.
        image_temperature: of a STARFlow2; None is the run's.
    """
    settings = {"batch_size": batch_size, "seed": seed}
    sample = model.cfg["sample"]
    if isinstance(model, Model):
        if model.codec is None:
            raise ValueError("images: --fae is needed: the model draws latents")
        options = sampling_defaults(sample, guidance=guidance, image_temperature=image_temperature)
        real = read_real(data, rows, model.codec.model.pixels)
        answer_fn = ask.make_answer_fn(model, **settings, **options)
        answers = answer_fn(real.prompts, "image")
        parts = [ask.answer_image(row, f"record {i}") for i, row in enumerate(answers)]
        return np.stack([part.image for part in parts]), real, {**settings, **options}
    pixels, path = model.cfg["image"]["pixels"], fae or model.cfg["fae"]["path"]
    codec = None if pixels or not path else latent_codec.load(path)
    if codec is None and not pixels:
        raise ValueError("images: --fae is needed: the flow draws latents")
    real = read_real(data, rows, codec.model.pixels if codec else pixels)
    options = {name: sample[name] for name in ("guidance", "denoise")}
    options |= {"rule": sample["guidance_rule"]}
    options |= {} if guidance is None else {"guidance": guidance}
    sampling = FlowSampling(seed=seed, batch=batch_size, **options)
    images = _draw_flow(model, real, sampling)
    return (latent_codec.decode(codec, images) if codec else images), real, {**settings, **options}


def _draw_flow(model: FlowModel, real: RealImages, sampling: FlowSampling) -> np.ndarray:
    """Return images, or latents, of a flow for the captions or classes of a dataset."""
    reads_captions = bool(model.cfg["text"]["vocabulary"])
    if model.model_config.text_channels and not reads_captions:
        raise ValueError(
            "images: the flow reads features of text; draw by `generate` and name --images"
        )
    if reads_captions and real.captions is None:
        raise ValueError("images: the model draws from captions, and the data have none")
    if model.model_config.classes and real.labels is None:
        raise ValueError("images: the model draws from classes, and the data have no labels")
    return flow_sampler.generate(
        model,
        len(real.images),
        prompts=real.captions if reads_captions else None,
        labels=real.labels if model.model_config.classes else None,
        sampling=sampling,
    )


def summary_lines(result: Mapping[str, Any]) -> Sequence[str]:
    """Return the metrics as lines of text."""
    figures = result["metrics"]
    counts = f"{figures['images']:,} images against {figures['real_images']:,} real ones"
    lines = [counts] + [
        f"{name.replace('_', ' '):26} {value:.4f}"
        for name, value in figures.items()
        if isinstance(value, float)
    ]
    return [*lines, *(f"not run: {name}: {why}" for name, why in result["not_run"].items())]
