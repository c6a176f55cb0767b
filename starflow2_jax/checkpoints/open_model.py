"""Open a trained model on disk: a run, one step of a run, or a model folder.

`open_model(path)` reads the configuration and metadata; `read_params` of the result reads weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from starflow2_jax import params
from starflow2_jax.checkpoints import hub, model_folder
from starflow2_jax.params import Tree
from starflow2_jax.runtime import atomic

# Metadata that an exported model folder keeps in its config.json.
EXPORTED_METADATA = ("classes", "null_text", "frozen", "parts")


@dataclass(frozen=True)
class SavedModel:
    """A model on disk. Its weights are not read until `read_params` or `open_params` is called."""

    path: str  # workdir of the run, or model folder; `pretrained/` and `hf://` are resolved
    step: int | None  # number of the checkpoint's step; None for a model folder
    config: dict[str, Any]  # the resolved configuration of the experiment that trained the model
    # `classes` (names of the classes), `null_text` (features of the empty prompt), `frozen` (sha256
    # of every frozen model it was trained with, by name), and everything else that a checkpoint's
    # `meta` contains
    metadata: dict[str, Any]

    @property
    def is_folder(self) -> bool:
        """Return True for a model folder, which holds every subtree, not only the trained ones."""
        return self.step is None

    @property
    def task(self) -> str:
        """Return the `task` of the experiment. Models saved before that key existed are flows."""
        return self.config.get("task", "flow")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, empty if the model has none."""
        return tuple(self.metadata.get("classes") or ())

    @property
    def frozen(self) -> dict[str, str]:
        """Return the sha256 of every frozen model that the model was trained with, by name."""
        return dict(self.metadata.get("frozen") or {})

    def read_params(
        self,
        declared: Tree,
        device_mesh: Mesh | None = None,
        layout: str = "dp",
        *,
        dtype: Any = None,
        ema: bool = True,
        subtrees: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Read parameters onto devices.

        Args:
            declared: the declared tree. A model folder must hold exactly these weights. A
                checkpoint holds the trained subtrees only; pass those, or name them in `subtrees`.
            dtype: dtype of the result; by default the dtype on disk.
            ema: read the averaged weights of a checkpoint rather than the raw ones.
            subtrees: names of the top-level subtrees to read; all of them by default.
        """
        if self.is_folder:
            return model_folder.read_folder(
                self.path, declared, device_mesh, layout, dtype, subtrees=subtrees
            )
        if subtrees is not None:
            declared = params.split(declared, tuple(subtrees))[0]
        restored = self._restore(params.abstract(declared, device_mesh, layout), ema)
        if dtype is None:
            return restored
        return jax.tree.map(lambda leaf: leaf.astype(dtype), restored)

    def open_params(self, declared: Tree, *, ema: bool = True) -> dict[str, Any]:
        """Return parameters in host memory, for a conversion that never needs an accelerator.

        The leaves are `tensor_files.StoredTensor`s (read on request) for a model folder, and arrays
        on the CPU for a checkpoint. Arguments are those of `read_params`.
        """
        if self.is_folder:
            return model_folder.open_folder(self.path, declared)
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = params.abstract(declared)
        return self._restore(jax.tree.map(lambda leaf: leaf.update(sharding=cpu), abstract), ema)

    def _restore(self, abstract_params: Tree, ema: bool) -> dict[str, Any]:
        from starflow2_jax.checkpoints import orbax  # heavy

        part = "ema" if ema else "params"
        restored, _ = orbax.restore(self.path, self.step, {part: abstract_params}, only=(part,))
        return restored[part]


def open_model(path: str | Path) -> SavedModel:
    """Open a run (its newest checkpoint), a step folder of a run, or a model folder.

    Args:
        path: `WORKDIR`, `WORKDIR/checkpoints/STEP`, a model folder, `pretrained/NAME`, or
            `hf://user/name[@revision]`; local or an object store's `gs://...` (runs only).
    """
    is_local = hub.is_address(path) or not atomic.is_remote(path)
    location = str(model_folder.locate(path)) if is_local else str(path)
    if model_folder.is_folder(location):
        config = model_folder.read_config(location)
        config = config.get(model_folder.EXPERIMENT_KEY, config)
        metadata = {key: config[key] for key in EXPORTED_METADATA if key in config}
        return SavedModel(location, None, config, metadata)
    if hub.is_address(path):
        raise FileNotFoundError(
            f"{path}: no model folder (config.json with safetensors); `convert push` uploads one"
        )
    from starflow2_jax.checkpoints import orbax, steps  # heavy

    workdir, step = steps.locate(location)
    step = steps.find(workdir, step).step
    metadata = orbax.read_meta(workdir, step)
    return SavedModel(str(workdir), step, metadata.get("config", {}), metadata)
