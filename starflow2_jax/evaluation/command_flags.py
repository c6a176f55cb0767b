"""The model, the data and the result file that the flags of `evaluate` name."""

from typing import Any

from absl import flags

from starflow2_jax.data import manifest
from starflow2_jax.evaluation import result_files
from starflow2_jax.evaluation.result_files import ResultFile
from starflow2_jax.inference import load
from starflow2_jax.inference.model import Model
from starflow2_jax.mesh import make_mesh

# A result for --json, and the lines to print otherwise.
Output = tuple[dict[str, Any], list[str]]


def require(values: flags.FlagValues, verb: str, *names: str) -> None:
    """Raise ValueError if one of these flags has no value."""
    if not all(values[name].value for name in names):
        missing = " and ".join(f"--{name}" for name in names)
        raise ValueError(f"{verb}: {missing} {'is' if len(names) == 1 else 'are'} needed")


def open_result(
    values: flags.FlagValues, name: str, data: str, suffix: str = ".json"
) -> ResultFile:
    """Return the file of --out for --model; see `result_files.open_result`."""
    return result_files.open_result(
        values.model, values.out, name, data, suffix=suffix, overwrite=values.overwrite
    )


def describe_data(path: str) -> dict[str, str]:
    """Return path and fingerprint of a dataset folder."""
    return {"path": path, "fingerprint": manifest.fingerprint(manifest.load(path))}


def load_starflow2(values: flags.FlagValues, path: str = "") -> Model:
    """Load the STARFlow2 at `path`, by default --model, on one device unless a mesh is given."""
    device_mesh = make_mesh(values.mesh) if values["mesh"].present else None
    return load.load_starflow2(
        path or values.model,
        device_mesh,
        values.layout,
        vlm=values.vlm or "",
        fae=values.fae or "",
    )
