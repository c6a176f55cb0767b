"""Inputs of the commands of the soak test: small datasets, runs, models and sources of imports.

Each is made once, when a trial first needs it, in a folder that is the working directory of its
command: paths in configurations are relative, and so remain valid in the folders of the trials.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from soak.fork_server import ForkServer, Job

EXPERIMENT = "experiment.py"
CAPTIONS = ("a red circle", "a blue square", "two stars", "a green cross")
_SHAPES = ("--format", "shapes", "--pixels", "8", "--tags", "single_object", "--label", "color")
# The commands that make an asset, and the assets that they read.
_COMMANDS = {
    "shapes": ((), "prepare", ("import", *_SHAPES, "--n", "24", "--out", "shapes")),
    "shapes_old": (
        (),
        "prepare",
        ("import", *_SHAPES, "--n", "8", "--seed", "1", "--out", "shapes_old"),
    ),
    "run": (("shapes", EXPERIMENT), "train", ("--config", EXPERIMENT, "--workdir", "run")),
    "model": (("run",), "convert", ("export", "--model", "run", "--out", "model")),
    "model_old": (
        ("run",),
        "convert",
        ("export", "--model", "run/checkpoints/2", "--out", "model_old"),
    ),
    "public": (("run",), "convert", ("export", "--model", "run", "--public", "--out", "public")),
    "starflow2": (
        ("parts",),
        "convert",
        ("export", "--model", "parts/run", "--out", "starflow2"),
    ),
    "latents": (
        ("parts",),
        "prepare",
        ("latents", "--data", "parts/data", "--fae", "parts/fae", "--out", "latents"),
    ),
}
_FUNCTIONS = {
    EXPERIMENT: "make_experiment",
    "parts": "make_parts",
    "sources": "make_sources",
    "wide": "make_wide",
}
# Functions `make_NAME`, and the assets that they read.
_COPIES = {"half_run": ("run",), "half_latents": ("parts", "wide"), "indexed": ("parts",)}


class Assets:
    """A folder of assets, made on demand."""

    def __init__(self, folder: Path, server: ForkServer):
        self.folder, self.server = folder, server
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the path of an asset, after making it if need be."""
        path = self.folder / name
        if path.exists():
            return path
        if name in _COPIES:
            for required in _COPIES[name]:
                self.path(required)
            job = Job(f"soak.assets:make_{name}", (), str(self.folder))
        elif name in _FUNCTIONS:
            job = Job(f"soak.assets:{_FUNCTIONS[name]}", (), str(self.folder))
        else:
            inputs, command, arguments = _COMMANDS[name]
            for required in inputs:
                self.path(required)
            job = Job(f"starflow2_jax.{command}", arguments, str(self.folder))
        ending = self.server.run(job)
        if ending.status or not path.exists():
            raise RuntimeError(f"{name} was not made: {ending.output}\n{ending.errors}")
        return path

    def copy(self, name: str, folder: Path, new_name: str = "") -> None:
        """Copy an asset, `NAME` or `NAME=NEW_NAME`, to the folder of a trial."""
        name, _, renamed = name.partition("=")
        new_name = new_name or renamed
        source, target = self.path(name), folder / (new_name or name)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def make_experiment() -> None:
    """Copy the configuration of the small training."""
    shutil.copyfile(Path(__file__).with_name("tiny_experiment.py"), EXPERIMENT)


def make_parts() -> None:
    """Make a tiny VLM, a tiny codec and a STARFlow2 run of both."""
    from helpers import starflow2_folders

    Path("parts.new").mkdir()
    Path("parts.new").rename("parts")
    starflow2_folders.make(Path("parts"))


def make_sources() -> None:
    """Make sources of imports: a tar, a folder of images, and questions about images."""
    from helpers.import_sources import make_tar, talk

    from starflow2_jax.data import images

    rng = np.random.default_rng(0)
    folder = Path("sources")
    (folder / "pets").mkdir(parents=True)
    members = []
    for number, caption in enumerate(CAPTIONS):
        data = images.encode_png(rng.integers(0, 256, (16, 16, 3), np.uint8))
        members += [(f"{number}.png", data), (f"{number}.txt", caption.encode())]
        (folder / "pets" / f"{number}.png").write_bytes(data)
        (folder / "pets" / f"{number}.txt").write_text(caption)
    make_tar(folder / "pets.tar", members)
    rows = [
        talk("<image>What is it?", caption, image=f"{n}.png") for n, caption in enumerate(CAPTIONS)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = "".join(json.dumps({"prompt": caption}) + "\n" for caption in CAPTIONS[:2])
    (folder / "geneval.jsonl").write_text(prompts)


def make_wide() -> None:
    """Make a dataset of three shards."""
    from starflow2_jax.data import records
    from starflow2_jax.shapes import generator

    rows = list(generator.make_records(0, 12, 16, tags=("single_object",)))
    size = sum(len(records.encode(row)) for row in rows)
    records.write("wide", rows, shard_bytes=size // 3)


def make_half_run() -> None:
    """Make a run that was killed between its two checkpoints."""
    shutil.copytree("run", "half_run")
    shutil.rmtree("half_run/checkpoints/4")
    Path("half_run/report.html").unlink()


def make_half_latents() -> None:
    """Make latents of which one of three shards is missing."""
    from starflow2_jax.latents import codec, write

    encode, encoder = codec.open_encoder("parts/fae")
    write.write("half_latents", "wide", encode, encoder, shard=(0, 2))


def make_indexed() -> None:
    """Make a dataset with an index, and its tokenizer."""
    from starflow2_jax.data import packing

    for name in ("data", "tokenizer"):
        shutil.copytree(f"parts/{name}", f"indexed/{name}")
    packing.load_or_make_plan(
        "indexed/data", "indexed/tokenizer", packing.PackingSpec(256, 4), 0, 0
    )
