"""Options and opened folders that image batches and packed batches share.

The training data are one dataset folder or a weighted mixture of several. Each folder may have
parallel folders of stored arrays (latents, text features) and a packing plan.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starflow2_jax.data.array_store import StoredArrays
from starflow2_jax.data.manifest import fingerprint
from starflow2_jax.data.packing import PackingPlan
from starflow2_jax.data.records import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """Options of every kind of batch."""

    path: str = ""  # one dataset folder; exactly one of `path` and `mixture` is set
    # Several folders, as mappings `{path, weight, ...}` with the folders of arrays of each. A
    # weight is a share of the examples: of images, of rows, or of records if rows mix folders.
    mixture: tuple[Mapping[str, Any], ...] = ()
    pixels: int = 0  # side of the square images; any other size is an error unless `resize` is set
    resize: str = "none"  # "center_crop" scales the short side to `pixels`, then crops; or "none"
    latents: str = ""  # folder of stored latents (from `prepare`), which replace the images
    shuffle: bool = True  # globally, in another order every epoch; or keep the folder's order
    seed: int = 0  # seed of the shuffle, below 2**32
    threads: int = 4  # reading threads, each making whole batches; 0 reads in the caller's thread
    # Processes that read the training data, each with `threads`; 0 reads in this process.
    processes: int = 0
    skip_long: int = 0  # records of a folder longer than a row that are left out of all rows
    skip_bad: int = 0  # different bad examples that each process may replace by their neighbors


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset folder of a mixture, opened, with its parallel folders.

    Its examples are the rows of `plan` or, without a plan, the records.
    """

    records: Dataset
    weight: float
    latents: StoredArrays | None = None
    text_features: StoredArrays | None = None
    plan: PackingPlan | None = None

    def __len__(self) -> int:
        return len(self.records if self.plan is None else self.plan)


def entries(options: MixtureOptions, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the checked entries of the mixture, or one entry for `path`, with all of `keys`."""
    if bool(options.path) == bool(options.mixture):
        raise ValueError("data.path or data.mixture: exactly one of them must be given")
    single = {key: getattr(options, key) for key in keys if key != "weight"}
    for key in single:
        if options.mixture and single[key]:
            raise ValueError(f"data.{key}: with data.mixture, set it in the entries of the mixture")
    checked = []
    for entry in options.mixture or (single,):
        refuse_unknown_keys(entry, keys, "data.mixture[]")
        entry = {**dict.fromkeys(keys, ""), "weight": 1.0, **entry}
        weight = entry["weight"] = float(entry["weight"])
        if not weight > 0:
            raise ValueError(f"data.mixture[]: the weight of {entry['path']} is {weight}, not > 0")
        if not entry["latents"] and not options.pixels:
            raise ValueError(f"data.pixels must be set to read the images of {entry['path']}")
        checked.append(entry)
    return checked


def describe(sources: Sequence[Source], **details: Any) -> dict[str, Any]:
    """Return the number of records, `details`, the folders' fingerprints and arrays' features."""
    folders = [f for source in sources for f in (source.latents, source.text_features) if f]
    return {
        "records": sum(len(source.records) for source in sources),
        **details,
        "fingerprints": [fingerprint(source.records.manifest) for source in sources],
        "features": [folder.manifest.features for folder in folders],
    }


def refuse_unknown_keys(keys: Iterable[str], known: Sequence[str], prefix: str) -> None:
    """Raise ValueError for a key that is not among `known`, and suggest the nearest one."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{prefix}.{key}: unknown key; {hint}")
