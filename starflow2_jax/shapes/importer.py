"""The `shapes` format of `prepare import`: flags -> records of the synthetic benchmark."""

import functools

from absl import flags

from starflow2_jax.data.manifest import DatasetError, Importer
from starflow2_jax.importers import captioned
from starflow2_jax.importers.registry import ImportSource
from starflow2_jax.shapes import generator, tasks


def shapes_source(values: flags.FlagValues) -> ImportSource:
    """Return the records that the flags of `prepare import` ask for."""
    count, pixels = values.n or 10_000, values.pixels or 32
    unknown = [tag for tag in values.tags if tag not in generator.TAGS]
    if unknown or not values.tags:
        raise DatasetError(
            f"--tags: unknown {unknown}, expected some of {', '.join(generator.TAGS)}"
        )
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
        tags=values.tags,
        withheld=values.withheld,
        label=label,
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
    classes = generator.classes(label) if label else None
    return ImportSource(make, Importer("shapes", captioned.VERSION, options), {}, classes)
