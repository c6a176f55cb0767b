"""Make and inspect datasets.

python -m starflow2_jax.prepare import --format shapes --n 10000 --pixels 32 --out data/shapes
python -m starflow2_jax.prepare import --format webdataset --source pets.tar --out data/pets
python -m starflow2_jax.prepare show --data data/pets --out pets.png
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from starflow2_jax.config import checks
from starflow2_jax.data import (
    chat_layout,
    images,
    manifest,
    packing,
    records,
    shards,
    statistics,
    tokenizer as tokenizer_lib,
)
from starflow2_jax.data.manifest import DatasetError, Importer, Manifest
from starflow2_jax.data.records import Record
from starflow2_jax.importers import captioned
from starflow2_jax.importers.redraw import BACKGROUNDS
from starflow2_jax.importers.registry import CAPTIONED, IMPORTERS
from starflow2_jax.runtime import atomic, cli
from starflow2_jax.shapes import generator, holdout, tasks
from starflow2_jax.shapes.importer import shapes_source
from starflow2_jax.training.logging import image_grid

SOURCES = {**IMPORTERS, "shapes": shapes_source}
VERBS = {
    "import": "a source to a dataset folder (--format --source --out)",
    "validate": "schema, checks and image decoding of every record (--data)",
    "verify": "sha256 of every shard (--data)",
    "stats": "counts, sizes, caption lengths, classes (--data)",
    "show": "contact sheet with captions (--data --out)",
    "tokenizer": "a small tokenizer of a dataset's texts (--data --vocabulary --out)",
    "index": "lengths and packing plan of rows (--data --tokenizer --row_length)",
    "features": "SD-VAE latents and T5 text features, in parallel (--data --vae --t5 --out)",
    "latents": "a trained codec's latents, in parallel (--data --fae --out --shard i/n)",
}
_MAX_PROBLEMS = 20


def define(values: flags.FlagValues) -> None:
    """Define the flags of this command."""
    text = partial(flags.DEFINE_string, flag_values=values)
    switch = partial(flags.DEFINE_boolean, flag_values=values)
    choice = partial(flags.DEFINE_enum, flag_values=values)
    names = partial(flags.DEFINE_list, flag_values=values)
    strings = partial(flags.DEFINE_multi_string, flag_values=values)

    number = partial(cli.define_integer, flag_values=values)

    text("data", None, "dataset folder to read")
    text("out", None, "what to write: a dataset folder, or a PNG for show")
    switch("overwrite", False, "replace what --out names")
    switch("json", False, "print the result as JSON")
    choice("format", None, list(SOURCES), "kind of source to import")
    strings(
        "source",
        [],
        "files (wildcards allowed, may be repeated), an image folder, a folder of "
        "datasets.save_to_disk, or the name of a TFDS set",
    )
    text(
        "label",
        "none",
        "classes: none, caption (the distinct captions), a class feature of a TFDS or huggingface "
        "set, or for shapes: " + ", ".join(generator.LABELS),
    )
    number("missing_captions", 0, "images without a caption that may be left out", 0)
    number("bad_images", 0, "images that cannot be read that may be left out", 0)
    number("bad_rows", 0, "rows and examples of another form that may be left out", 0)
    switch("check_pixels", False, "import: decode every image, which finds truncated ones")
    captioned_formats = ", ".join(CAPTIONED)
    number(
        "n",
        None,
        "import: number of shapes or procedural images (10000), or the most images to read from "
        f"{captioned_formats}; show: images on the sheet (24)",
    )
    number(
        "pixels",
        None,
        "side of the images: shapes (32), procedural (64), features (256), "
        f"{captioned_formats} (unchanged; scaled and cropped if given)",
        8,
        8192,
    )
    names(
        "background",
        [],
        f"{captioned_formats}: what to draw transparent images on, {' or '.join(BACKGROUNDS)}; "
        "several, with commas, give a copy on each (white when read)",
    )
    number("seed", 0, "seed: shapes, procedural, random backgrounds, index", 0, checks.MAX_SEED)
    names(
        "tags",
        list(generator.TAGS),
        "kinds of shapes images, in turn; position=2 takes two turns, and single_object,colors "
        "restricts all tasks to single objects",
    )
    names("tasks", ["t2i"], "shapes records, in turn: " + ", ".join(tasks.ALL_TASKS))
    choice("withheld", "none", holdout.CHOICES, "shapes pairs and combinations kept for evaluation")
    switch("balance_answers", False, "shapes: each answer of counting questions equally often")
    text("split", "train", "split of the TFDS set")
    text("tfds_dir", None, "data_dir of the TFDS set")
    text("image_key", "image", "image feature: TFDS, huggingface")
    text("text_key", None, "caption feature: TFDS, huggingface")
    text("image_root", "", "folder of the images: llava, obelics, omnicorpus")
    choice(
        "missing_images",
        "record",
        ("record", "image"),
        "what to leave out, and count, if an image is missing",
    )
    text("caption", "all", "bagel_t2i: name of the caption to use")
    text("vae", None, "features: folder of a diffusers AutoencoderKL")
    text("t5", None, "features: folder of a T5 encoder and tokenizer")
    number("text_length", 128, "features: tokens of text", 1, 1_000_000)
    number("patch", 1, "features: latent pixels on a side of a token", 1, 8192)
    number("row_length", 2048, "index: positions of a row", 1, 100_000_000)
    text("tokenizer", None, "index: folder of a tokenizer")
    number("vocabulary", 640, "tokenizer: number of ids", 1, 10_000_000)
    number("tower_patch", 4, "tokenizer: pixels along a patch of the vision tower", 1, 8192)
    number("tower_merge", 2, "tokenizer: patches of the tower along one feature", 1, 8192)
    number("image_tokens", 256, "index: positions of an image", 1, 100_000_000)
    number("skip_long", 0, "index: records longer than a row that may be left out", 0)
    number("row_images", 0, "index: images of a row, 0 for as many as fit", 0)
    switch("clean_copies", False, "index: images with loss are read again (noise.context_sigma)")
    number("batch_size", 8, "features: images encoded at once", 1, 100_000)
    text("fae", None, "latents: workdir or model folder of the codec")
    text("shard", "0/1", "latents: i/n, this is job i of n jobs that share the shards")
    switch("beam", False, "latents: write the shards in an Apache Beam pipeline")
    strings("beam_option", [], "latents: option of the pipeline, may be repeated")
    text("device", "cpu", "features: torch device")


def import_(values: flags.FlagValues) -> dict[str, Any]:
    """Import a source to a dataset folder. Do nothing if the same import is complete."""
    out, kind = _required(values, "out"), _required(values, "format")
    if values.background and kind not in CAPTIONED:
        raise DatasetError(f"--background: only for {', '.join(CAPTIONED)}, not for {kind}")
    source = SOURCES[kind](values)
    importer, sources, classes, tally = source.importer, source.hashes, source.classes, source.tally
    if os.path.exists(out) and not values.overwrite:
        if existing := _same_import(out, importer, sources):
            size = {"records": existing.records, "bytes": existing.bytes}
            return {"out": out, **size, "was": "complete"}
        shards.check_absent(out, overwrite=False)

    def make() -> Iterator[Record]:
        if tally is not None:
            tally.clear()
        return source.make()

    if values.label == "caption":
        classes, rows = captioned.label_by_caption(make)
    else:
        rows = make()
    try:
        written = records.write(
            out,
            rows,
            importer=importer,
            sources=sources,
            classes=classes,
            overwrite=values.overwrite,
            leave_out=tally.leave_out_record if tally is not None else None,
            left_out=(lambda: dict(tally.reasons)) if tally is not None else None,
        )
    except shards.NoRecordsError as error:
        reasons = (
            [f"images missing: {n}; is --image_root right?"]
            if (n := source.counts().get("missing_images"))
            else []
        )
        reasons += [tally.summary()] if tally is not None and tally.reasons else []
        raise DatasetError("; ".join([str(error), *reasons])) from error
    return {
        "out": out,
        "records": written.records,
        "bytes": written.bytes,
        "shards": len(written.shards),
        "classes": len(classes) if classes else 0,
        **source.counts(),
        **(tally.counts() if tally is not None else {}),
    }


def _same_import(out: str, importer: Importer, sources: dict[str, str]) -> Manifest | None:
    """Return the manifest of `out` if it is the result of this import."""
    try:
        existing = manifest.load(out)
    except DatasetError:
        return None
    is_same = existing.importer == importer and existing.sources == sources
    return existing if is_same else None


def validate(values: flags.FlagValues) -> dict[str, Any]:
    """Check schema, constraints and image decoding of every record; list the problems."""
    return _problems(_required(values, "data"), records.validate)


def verify(values: flags.FlagValues) -> dict[str, Any]:
    """Compare every shard with its sha256; list damaged shards and records."""
    return _problems(_required(values, "data"), records.verify)


def stats(values: flags.FlagValues) -> dict[str, Any]:
    """Count records, segments, image sizes and formats, caption lengths, classes."""
    return statistics.describe(records.read(_required(values, "data")))


def show(values: flags.FlagValues) -> dict[str, Any]:
    """Write a contact sheet with captions, of records spread evenly over the dataset."""
    out = pathlib.Path(_required(values, "out"))
    if out.suffix != ".png":
        raise DatasetError(f"--out {out}: expected a file name that ends in .png")
    dataset = records.read(_required(values, "data"))
    count = min(values.n or 24, len(dataset))
    pixels, captions = [], []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        record = dataset[index]
        for blob in record.imgs:
            location = f"{dataset.location(index)} (id {record.id!r})"
            pixels.append(_fit(images.decode(blob.data, location)))
            captions.append(records.text(record))
    if not pixels:
        raise DatasetError(f"{values.data}: none of {count} records has an image")
    sheet = image_grid.grid(np.stack(pixels), captions, columns=min(8, len(pixels)))
    data = image_grid.png(sheet)
    # An equal file is that of the same command, which was killed after it had written it.
    if out.exists() and not values.overwrite and out.read_bytes() != data:
        raise DatasetError(f"{out} exists; choose another --out or give --overwrite")
    atomic.write_file(out, data)
    height, width, _ = sheet.shape
    return {"out": str(out), "pictures": len(pixels), "pixels": f"{width}x{height}"}


def _fit(pixels: np.ndarray, side: int = 128) -> np.ndarray:
    """Scale an image uint8 [H, W, 3] to [side, side, 3], padded with white."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    # Small images keep their pixels visible.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image.resize(size, method), (0, 0))
    return np.asarray(square)


def features(values: flags.FlagValues) -> dict[str, Any]:
    """Encode images with an SD-VAE and captions with T5, to a parallel dataset of arrays."""
    from starflow2_jax.checkpoints.model_folder import locate
    from starflow2_jax.latents import sd_vae_t5

    out = _required(values, "out")
    options = sd_vae_t5.FeatureOptions(
        text_length=values.text_length,
        pixels=values.pixels or 256,
        patch=values.patch,
        batch_size=values.batch_size,
        device=values.device,
    )
    data, overwrite = _required(values, "data"), values.overwrite
    vae, t5 = (str(locate(path)) if path else None for path in (values.vae, values.t5))
    written = sd_vae_t5.write(out, data, options, vae=vae, t5=t5, overwrite=overwrite)
    arrays = {name: a["shape"] for name, a in written.features["arrays"].items()}
    return {"out": out, "records": written.records, "bytes": written.bytes, "arrays": arrays}


def tokenizer(values: flags.FlagValues) -> dict[str, Any]:
    """Write a folder with a tokenizer, chat template and image processor."""
    data, out = (_required(values, name) for name in ("data", "out"))
    trained = tokenizer_lib.train(data, values.vocabulary)
    tokenizer_lib.write(trained, out, patch=values.tower_patch, merge=values.tower_merge, frames=2)
    return {"out": out, "size": chat_layout.open_tokenizer(out).vocab_size}


def index(values: flags.FlagValues) -> dict[str, Any]:
    """Write lengths and a packing plan next to the manifest, or read them if they exist."""
    from starflow2_jax.checkpoints.model_folder import locate

    spec = packing.PackingSpec(
        values.row_length, values.image_tokens, values.row_images, values.clean_copies
    )
    data, tokenizer = (_required(values, name) for name in ("data", "tokenizer"))
    file, plan = packing.load_or_make_plan(
        data, str(locate(tokenizer)), spec, values["seed"].value, values.skip_long
    )
    return {
        "out": file,
        "records": len(plan.items),
        "too_long": plan.num_left_out,
        "rows": len(plan),
        "longest": int(plan.lengths[plan.items].max()),
        "waste": round(plan.waste, 4),
    }


def latents(values: flags.FlagValues) -> dict[str, Any]:
    """Encode images with a trained codec. The same command resumes an interrupted one.

    With --overwrite, latents of another codec or dataset are replaced; those of this one are kept.
    """
    from starflow2_jax.latents import codec, write, write_beam

    out, data, fae = (_required(values, name) for name in ("out", "data", "fae"))
    if values.overwrite and (values.beam or values.shard != "0/1"):
        raise DatasetError(
            "--overwrite: not with --beam or --shard, where other jobs write as well"
        )
    if values.beam:
        options = values.beam_option
        counts = write_beam.write(out, data, codec.open_encoder, fae, options=options)
    else:
        shard = write.parse_shard(values.shard)
        encode, encoder = codec.open_encoder(fae)
        if values.overwrite and write.remove_stale(out, data, encoder):
            print(f"removed {out}: latents of another codec or dataset")
        counts = write.write(out, data, encode, encoder, shard=shard)
    return {"out": out, **counts}


def _problems(path: str, check: Callable[[str], Iterator[str]]) -> dict[str, Any]:
    problems = list(check(path))
    return {
        "data": path,
        "records": manifest.load(path).records,
        "problems": len(problems),
        "first": problems[:_MAX_PROBLEMS],
    }


def _required(values: flags.FlagValues, name: str) -> str:
    value = values[name].value
    if not value:
        raise DatasetError(f"--{name} must be given")
    return value


_RUN = {
    "import": import_,
    "validate": validate,
    "verify": verify,
    "stats": stats,
    "show": show,
    "tokenizer": tokenizer,
    "index": index,
    "features": features,
    "latents": latents,
}


def main(verb: str, argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Run one verb and print its result. Exit with status 1 if it reports problems."""
    if argv:
        raise ValueError(f"unexpected argument {argv[0]!r}; sources are given by --source")
    result = _RUN[verb](values)
    if values.json:
        print(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            print(f"{name}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    if result.get("problems"):
        sys.exit(1)


if __name__ == "__main__":
    define(flags.FLAGS)
    cli.run(main, VERBS)
