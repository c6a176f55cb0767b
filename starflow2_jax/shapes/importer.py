"""The `shapes` format of `prepare import`: flags -> records of the synthetic benchmark."""

import functools
from collections.abc import Sequence

from absl import flags

from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.importers.registry import ImportSource
from starflow2_jax.shapes import generator, tasks

VERSION = "1"  # in the manifest; raise it when equal options would give other records
_MAX_WEIGHT = 100  # of a tag


def shapes_source(values: flags.FlagValues) -> ImportSource:
    """Return the records that the flags of `prepare import` ask for."""
    count, pixels = values.n or 10_000, values.pixels or 32
    tags = _weighted_tags(values.tags)
    label = values.label if values.label not in ("none", "caption") else None
    only_t2i = values.tasks == ["t2i"]
    if values.label != "none" and not only_t2i:
        raise DatasetError(f"--label {values.label}: only --tasks t2i has classes")
    make = functools.partial(
        tasks.make_records,
        values.seed,
        count,
        pixels,
        tasks=values.tasks,
        tags=tags,
        withheld=values.withheld,
        label=label,
        balance_answers=values.balance_answers,
    )
    options = {
        "label": values.label,
        "seed": values.seed,
        "n": count,
        "pixels": pixels,
        "tags": ",".join(values.tags),
    }
    if not only_t2i:
        options["tasks"] = ",".join(values.tasks)
    if values.withheld != "none":
        options["withheld"] = values.withheld
    if values.balance_answers:
        options["balance_answers"] = True
    classes = generator.classes(label) if label else None
    return ImportSource(make, Importer("shapes", VERSION, options), {}, classes)


def _weighted_tags(words: Sequence[str]) -> list[str]:
    """Return the tags of --tags, "position=2" twice; the repeats follow after all the others."""
    weights: list[tuple[str, int]] = []
    for word in words:
        tag, _, weight = word.partition("=")
        if "=" in word and not (weight.isdecimal() and 1 <= int(weight) <= _MAX_WEIGHT):
            raise DatasetError(
                f"--tags {word}: expected a whole number, 1 to {_MAX_WEIGHT}, after ="
            )
        weights.append((tag, int(weight or 1)))
    unknown = [tag for tag, _ in weights if tag not in generator.TAGS]
    if unknown or not weights:
        raise DatasetError(
            f"--tags: unknown {unknown}, expected some of {', '.join(generator.TAGS)}"
        )
    rounds = range(max(weight for _, weight in weights))
    return [tag for k in rounds for tag, weight in weights if k < weight]
