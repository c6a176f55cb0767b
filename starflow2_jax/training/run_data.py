"""The datasets of a run, opened once and described, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starflow2_jax.latents import batch_encoder
from starflow2_jax.latents.codec import Codec
from starflow2_jax.runtime import distributed

if TYPE_CHECKING:
    from starflow2_jax.training.tasks.task import Task

GROUPS = ("data", "eval_data")


@dataclass(frozen=True)
class RunData:
    """The datasets of a run."""

    task: Task
    codec: Codec | None  # encodes images during training, if `fae.path` names one
    # Group of keys (`data`, and `eval_data` if it is set) -> the reader's description of its data:
    # fingerprints, classes and features
    descriptions: Mapping[str, Mapping[str, Any]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the training data."""
        return tuple(self.descriptions["data"]["classes"] or ())

    @property
    def null_text(self) -> list | None:
        """Features of the empty prompt, as `prepare features` stores them."""
        features = self.descriptions["data"]["features"]
        return next((f["null_text"] for f in features if "null_text" in f), None)

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of the training records, and of the encoder of their latents."""
        return fingerprints(self.descriptions)

    @property
    def held_out_group(self) -> str:
        """The group with the prompts of sample grids: `eval_data`, or else `data`."""
        return "eval_data" if "eval_data" in self.descriptions else "data"

    def options(self, group: str) -> Any:
        """Return the reader's options for a group of keys."""
        return batch_encoder.options(self.task.data_options(group), self.codec)

    def batches(self, **options: Any) -> Iterator[dict[str, Any]]:
        """Return endless training batches; options of the reader's `batches`."""
        batches = self.task.reader.batches(self.options("data"), **options)
        return batch_encoder.encoded(batches, self.codec)


def open_data(cfg: Mapping[str, Any], task: Task, codec: Codec | None) -> RunData:
    """Open and check the datasets of an experiment."""
    groups = [group for group in GROUPS if cfg[group]["path"] or cfg[group]["mixture"]]
    if "data" not in groups:
        raise ValueError("config: data.path or data.mixture is needed")
    descriptions = {}
    for group in groups:
        options = batch_encoder.options(task.data_options(group), codec)
        description = task.reader.describe(options)
        descriptions[group] = batch_encoder.describe(description, codec, f"{group}.latents")
    distributed.assert_equal_across_processes(
        "the data", {group: entry["fingerprints"] for group, entry in descriptions.items()}
    )
    _check_classes(cfg, descriptions)
    return RunData(task, codec, descriptions)


def summary(data: RunData) -> str:
    """Return a line about the training data: its records, and how packed rows are filled."""
    description = data.descriptions["data"]
    line = f"data: {description['records']:,} records"
    if "training_waste" in description:
        line += (
            f", {description['records_per_row']:.2f} in a row, of whose positions "
            f"{description['training_waste']:.1%} are padding"
        )
    if "records_too_long" in description:
        line += f"; {description['records_too_long']:,} are longer than a row and left out"
    return line


def fingerprints(descriptions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the fingerprints of the training records, and of the encoder of their latents."""
    description = descriptions["data"]
    encoders = [features.get("fae") for features in description["features"]]
    return [*description["fingerprints"], *(encoder["sha256"] for encoder in encoders if encoder)]


def _check_classes(cfg: Mapping[str, Any], descriptions: Mapping[str, Any]) -> None:
    """Raise ValueError if the labels are not the model's: JAX does not report an invalid one."""
    expected = cfg["model"].get("classes", 0)
    for group, description in descriptions.items() if expected else ():
        count = len(description["classes"] or ()) if cfg[group]["labels"] else 0
        if count != expected:
            raise ValueError(f"config: model.classes={expected}, but {group} gives {count} classes")
        if description["classes"] != descriptions["data"]["classes"]:
            raise ValueError(f"config: the classes of {group} are not those of data")
