"""Makes and inspects datasets.

python -m starflow2_jax.prepare import --format shapes --n 10000 --pixels 32 --out data/shapes
python -m starflow2_jax.prepare import --format webdataset --source pets.tar --out data/pets
python -m starflow2_jax.prepare show --data data/pets --out pets.png
"""

import json
import os
import pathlib
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from starflow2_jax.data import (
    chat_layout,
    images,
    manifest,
    packing,
    records,
    shards,
    tokenizer as tokenizer_lib,
)
from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.importers import captioned
from starflow2_jax.importers.registry import IMPORTERS
from starflow2_jax.runtime import cli
from starflow2_jax.shapes import generator, holdout, tasks
from starflow2_jax.shapes.importer import shapes_source

SOURCES = {**IMPORTERS, "shapes": shapes_source}
VERBS = {
    "import": "source -> dataset folder (--format --source --out)",
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
    """Defines the flags of this command."""
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("data", None, "dataset folder to read", flag_values=values)
    text("out", None, "what to write: a dataset folder, or a PNG for show", flag_values=values)
    switch("overwrite", False, "replace what --out names", flag_values=values)
    switch("json", False, "print the result as JSON", flag_values=values)
    flags.DEFINE_enum("format", None, list(SOURCES), "kind of source to import", flag_values=values)
    flags.DEFINE_multi_string(
        "source", [], "files (wildcards allowed, may be repeated), an image folder, a folder of "
        "datasets.save_to_disk, or the name of a TFDS set", flag_values=values,
    )  # fmt: skip
    text("label", "none", "classes: none, caption (the distinct captions), a class feature of the "
         "TFDS set, or for shapes: " + ", ".join(generator.LABELS), flag_values=values)  # fmt: skip
    number("missing_captions", 0, "images without a caption that may be left out", 0,
           flag_values=values)  # fmt: skip
    number("n", None, "import: pictures of shapes (10000); show: pictures on the sheet (24)", 1,
           flag_values=values)  # fmt: skip
    number("pixels", None, "side of the images: shapes (32), features (256)", 8, flag_values=values)
    number("seed", 0, "seed: shapes, index", 0, flag_values=values)
    flags.DEFINE_list("tags", list(generator.TAGS), "kinds of shapes pictures", flag_values=values)
    flags.DEFINE_list("tasks", ["t2i"], "shapes records, in turn: "
                      + ", ".join(tasks.TASKS), flag_values=values)  # fmt: skip
    flags.DEFINE_enum("withheld", "none", holdout.CHOICES, "shapes pairs and combinations "
                      "kept for evaluation", flag_values=values)  # fmt: skip
    text("split", "train", "split of the TFDS set", flag_values=values)
    text("tfds_dir", None, "data_dir of the TFDS set", flag_values=values)
    text("image_key", "image", "image feature: TFDS, huggingface", flag_values=values)
    text("text_key", None, "caption feature: TFDS, huggingface", flag_values=values)
    text("image_root", "", "folder of the images: llava, obelics, omnicorpus", flag_values=values)
    flags.DEFINE_enum("missing_images", "record", ("record", "image"), "what is left out, and "
                      "counted, where an image is not there", flag_values=values)  # fmt: skip
    text("caption", "all", "bagel_t2i: the caption to take, by name", flag_values=values)
    text("vae", None, "features: folder of a diffusers AutoencoderKL", flag_values=values)
    text("t5", None, "features: folder of a T5 encoder and tokenizer", flag_values=values)
    number("text_length", 128, "features: tokens of text", 1, flag_values=values)
    number("patch", 1, "features: latent pixels on a side of a token", 1, flag_values=values)
    number("row_length", 2048, "index: positions of a row", 1, flag_values=values)
    text("tokenizer", None, "index: folder of a tokenizer", flag_values=values)
    number("vocabulary", 640, "tokenizer: how many ids", 1, flag_values=values)
    number(
        "tower_patch", 4, "tokenizer: pixels of a patch of the vision tower", 1, flag_values=values
    )
    number("tower_merge", 2, "tokenizer: patches of the tower side by side in one feature", 1,
           flag_values=values)  # fmt: skip
    number("image_tokens", 256, "index: positions of an image", 1, flag_values=values)
    number("row_images", 0, "index: images of a row, 0 as many as fit", 0, flag_values=values)
    number("batch_size", 8, "features: images encoded at once", 1, flag_values=values)
    text("fae", None, "latents: workdir or model folder of the codec", flag_values=values)
    text("shard", "0/1", "latents: i/n, this job among n that share the shards", flag_values=values)
    switch("beam", False, "latents: make the shards in an Apache Beam pipeline", flag_values=values)
    flags.DEFINE_multi_string("beam_option", [], "latents: of the pipeline, may be repeated",
                              flag_values=values)  # fmt: skip
    text("device", "cpu", "features: torch device", flag_values=values)


def import_(values: flags.FlagValues) -> dict[str, Any]:
    """Source -> dataset folder. The same import over its own complete result does nothing."""
    out = _needed(values, "out")
    kind = _needed(values, "format")
    make, importer, sources, classes, counts = SOURCES[kind](values)
    if os.path.exists(out) and not values.overwrite:
        if _same(out, importer, sources):
            found = manifest.load(out)
            return {"out": out, "records": found.records, "bytes": found.bytes, "was": "complete"}
        shards.check_absent(out, overwrite=False)
    if values.label == "caption":
        classes, produced = captioned.label_by_caption(make)
    else:
        produced = make()
    written = records.write(
        out,
        produced,
        importer=importer,
        sources=sources,
        classes=classes,
        overwrite=values.overwrite,
    )
    return {
        "out": out,
        "records": written.records,
        "bytes": written.bytes,
        "shards": len(written.shards),
        "classes": len(classes) if classes else 0,
        **counts(),
    }


def validate(values: flags.FlagValues) -> dict[str, Any]:
    """Schema, checks and image decoding of every record; lists the problems."""
    return _problems(_needed(values, "data"), records.validate)


def verify(values: flags.FlagValues) -> dict[str, Any]:
    """sha256 of every shard, and where one differs the records that are damaged."""
    return _problems(_needed(values, "data"), records.verify)


def stats(values: flags.FlagValues) -> dict[str, Any]:
    """Counts of records, segments, image sizes and formats, caption lengths, classes."""
    dataset = records.read(_needed(values, "data"))
    sizes, formats, classes, tags = Counter(), Counter(), Counter(), Counter()
    targets = {"text": 0, "image": 0}
    lengths, image_bytes = [], 0
    for record in dataset:
        lengths.append(len(records.text(record).encode()))
        for blob in record.imgs:
            sizes[f"{blob.h}x{blob.w}"] += 1
            formats[blob.fmt] += 1
            image_bytes += len(blob.data)
        for segment in record.segs:
            targets["text" if isinstance(segment, records.Text) else "image"] += segment.loss
        if "label" in record.meta:
            classes[record.meta["label"]] += 1
        if "tag" in record.meta:
            tags[record.meta["tag"]] += 1
    names = dataset.manifest.classes or []
    return {
        "records": len(dataset),
        "bytes": dataset.manifest.bytes,
        "shards": len(dataset.manifest.shards),
        "importer": dataset.manifest.importer.name,
        "images": sum(sizes.values()),
        "image_bytes": image_bytes,
        "image_sizes_h_w": dict(sizes.most_common(20)),
        "image_formats": dict(formats.most_common()),
        "targets": targets,
        "caption_bytes": {
            "least": min(lengths),
            "median": int(statistics.median(lengths)),
            "most": max(lengths),
        },
        "tags": dict(sorted(tags.items())),
        "classes": {name: classes[number] for number, name in enumerate(names)},
    }


def show(values: flags.FlagValues) -> dict[str, Any]:
    """Writes a contact sheet with captions, records spread evenly over the dataset."""
    out = pathlib.Path(_needed(values, "out"))
    if out.suffix != ".png":
        raise DatasetError(f"--out {out}: expected a file name that ends in .png")
    if out.exists() and not values.overwrite:
        raise DatasetError(f"{out} exists; choose another --out or give --overwrite")
    dataset = records.read(_needed(values, "data"))
    count = min(values.n or 24, len(dataset))
    cells = []
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        record = dataset[index]
        for blob in record.imgs:
            where = f"{dataset.location(index)} (id {record.id!r})"
            cells.append((images.decode(blob.data, where), records.text(record)))
    if not cells:
        raise DatasetError(f"{values.data}: none of {count} records has an image")
    sheet = contact_sheet(cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    sheet.save(unfinished, format="PNG")
    os.replace(unfinished, out)
    return {"out": str(out), "pictures": len(cells), "pixels": f"{sheet.width}x{sheet.height}"}


def features(values: flags.FlagValues) -> dict[str, Any]:
    """Latents and text features of a dataset, as a parallel dataset of arrays."""
    from starflow2_jax.latents import sd_vae_t5 as features_lib

    out = _needed(values, "out")
    written = features_lib.write(
        out,
        _needed(values, "data"),
        vae=values.vae,
        t5=values.t5,
        text_length=values.text_length,
        pixels=values.pixels or 256,
        patch=values.patch,
        batch_size=values.batch_size,
        device=values.device,
        overwrite=values.overwrite,
    )
    arrays = {name: a["shape"] for name, a in written.features["arrays"].items()}
    return {"out": out, "records": written.records, "bytes": written.bytes, "arrays": arrays}


def tokenizer(values: flags.FlagValues) -> dict[str, Any]:
    """A folder with a tokenizer, chat template and image processor."""
    data, out = (_needed(values, name) for name in ("data", "out"))
    text = tokenizer_lib.train(data, values.vocabulary)
    tokenizer_lib.write(text, out, patch=values.tower_patch, merge=values.tower_merge, frames=2)
    return {"out": out, "size": chat_layout.open_tokenizer(out).vocab_size}


def index(values: flags.FlagValues) -> dict[str, Any]:
    """Lengths of the records and a packing plan, beside the manifest; done already, it is read."""
    room = packing.PackingSpec(values.row_length, values.image_tokens, values.row_images)
    data, tokenizer = (_needed(values, name) for name in ("data", "tokenizer"))
    file, plan = packing.load_or_make_plan(data, tokenizer, room, values["seed"].value)
    return {
        "out": file,
        "records": len(plan.lengths),
        "rows": len(plan),
        "longest": int(plan.lengths.max()),
        "waste": round(plan.waste, 4),
    }


def latents(values: flags.FlagValues) -> dict[str, Any]:
    """Latents of a dataset; what is finished is kept, so the same command resumes."""
    from starflow2_jax.latents import codec, write as latents_lib, write_beam

    out, data, fae = (_needed(values, name) for name in ("out", "data", "fae"))
    if values.overwrite:
        raise DatasetError("--overwrite: latents are never written over; choose another --out")
    if values.beam:
        options = values.beam_option
        found = write_beam.write(out, data, codec.open_encoder, fae, options=options)
    else:
        shard = latents_lib.parse_shard(values.shard)
        found = latents_lib.write(out, data, *codec.open_encoder(fae), shard=shard)
    return {"out": out, **found}


def contact_sheet(
    cells: list[tuple[np.ndarray, str]], side: int = 128, columns: int = 8
) -> Image.Image:
    """Pictures uint8 [H, W, 3] on a white sheet, `side` pixels each, captions below."""
    font = ImageFont.load_default(11)
    columns = min(columns, len(cells))
    lines = [textwrap.wrap(text, side // 6)[:4] for _, text in cells]
    line_height = 14
    step = (side + 8, side + 10 + line_height * max(1, max(map(len, lines))))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step[0] + 8, rows * step[1] + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (pixels, _) in enumerate(cells):
        image = Image.fromarray(pixels)
        scale = side / max(image.size)
        # Small pictures keep their pixels visible.
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        left, top = 8 + number % columns * step[0], 8 + number // columns * step[1]
        sheet.paste(image.resize(size, how), (left, top))
        for row, line in enumerate(lines[number]):
            pen.text((left, top + side + 2 + row * line_height), line, "black", font)
    return sheet


def _same(out: str, importer: Importer, sources: dict[str, str]) -> bool:
    try:
        found = manifest.load(out)
    except DatasetError:
        return False
    return found.importer == importer and found.sources == sources


def _problems(path: str, find: Callable[[str], Iterator[str]]) -> dict[str, Any]:
    found = list(find(path))
    count = manifest.load(path).records
    return {
        "data": path,
        "records": count,
        "problems": len(found),
        "first": found[:_MAX_PROBLEMS],
    }


def _needed(values: flags.FlagValues, name: str) -> str:
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


def main(verb: str, words: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs one verb and prints its result; exits with status 1 where it found problems."""
    if words:
        raise ValueError(f"unexpected argument {words[0]!r}; sources are given by --source")
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
