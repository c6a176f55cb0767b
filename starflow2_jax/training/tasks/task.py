"""The interface between a kind of training and the one training program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from starflow2_jax.params import Tree
from starflow2_jax.training.program import Batch, StepContext

Sums = Mapping[str, jax.Array]


def no_totals(batch: Batch) -> dict[str, jax.Array]:
    """Return the totals of a loss whose normalization does not depend on the batch: none."""
    del batch
    return {}


def no_params(device_mesh: Mesh) -> dict[str, Tree]:
    """Return the loaded parameters of a training that initializes all of its own: none."""
    del device_mesh
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of training: everything in which two kinds differ.

    Attributes:
        model_config: sizes and options of the network.
        declared: ParamSpecs of every top-level subtree.
        trainable: the subtrees with an optimizer.
        carried: subtrees that are in the state, and in its checkpoints, without an optimizer. All
            other subtrees are frozen: an argument of the step, in no checkpoint.
        load_params: device mesh -> the frozen subtrees, and those of the state that `loaded` names.
        loaded: subtrees of the state whose first values `load_params` reads.
        frozen_dtype: dtype of the frozen subtrees.
        frozen_identity: () -> sha256 of the files of each frozen model, by name.
        foreign: subtrees that never come from `init.from`, because they have a folder of their own.
        load_start: path of a model folder -> the parameters in it, if the folder does not contain
            the declared tree.
        optimizer: transforms the gradients of the trainable subtrees.
        abstract_batch: ShapeDtypeStructs of a batch of `train.batch_size` rows.
        batch_totals: batch -> what the loss of the global batch is divided by.
        loss: (trained params, batch, keys [B], StepContext) -> this microbatch's share of the loss
            of the global batch, summable metrics of each row [B], and what `track` observes.
        evaluate: (all params, batch, keys [B]) -> summable metrics of each row [B].
        finalize_metrics: summed metrics -> readable ones, the most important one first.
        track: (subtrees of the state, observed, summed metrics, step) -> the carried subtrees after
            the step, if they are running statistics. It is applied to raw and to averaged
            parameters; `observed` has an entry `params` and an entry `ema`.
        reconstruct: (all params, batch, keys [B]) -> uint8 images [B, H, W, 3].
        sample_kind: which grids of samples are drawn: `flow`, `interleaved`, `reconstruction`.
        data_options: (group of keys, `data` or `eval_data`) -> options of `reader`.
        packed: a batch consists of packed rows of interleaved records rather than of images.
        step_cost: () -> `tokens` and `flops` of a step; flops is 0 where it is not counted.
    """

    model_config: Any
    declared: Tree
    trainable: tuple[str, ...]
    optimizer: optax.GradientTransformation
    abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
    loss: Callable[[Tree, Batch, jax.Array, StepContext], tuple[jax.Array, Sums, Any]]
    evaluate: Callable[[Tree, Batch, jax.Array], Sums]
    finalize_metrics: Callable[[Mapping[str, Any]], dict[str, Any]]
    data_options: Callable[[str], Any]
    step_cost: Callable[[], dict[str, float]]
    carried: tuple[str, ...] = ()
    load_params: Callable[[Mesh], dict[str, Tree]] = no_params
    loaded: tuple[str, ...] = ()
    frozen_dtype: Any = jnp.float32
    frozen_identity: Callable[[], dict[str, str]] = dict
    foreign: tuple[str, ...] = ()
    load_start: Callable[[str], Tree] | None = None
    batch_totals: Callable[[Batch], dict[str, jax.Array]] = no_totals
    track: Callable[[Tree, Any, Sums, jax.Array], Tree] | None = None
    reconstruct: Callable[[Tree, Batch, jax.Array], jax.Array] | None = None
    sample_kind: str = ""
    packed: bool = False

    @property
    def reader(self) -> ModuleType:
        """The module with `describe`, `batches` and `eval_batches` of this task's data."""
        from starflow2_jax.data import image_batches, packed_batches  # heavy

        return packed_batches if self.packed else image_batches


def check_trainable(cfg: Mapping[str, Any], subtrees: tuple[str, ...]) -> None:
    """Check `train.trainable` of a task that always trains the same subtrees.

    Raises:
        ValueError: It names other subtrees.
    """
    actual = list(cfg["train"]["trainable"])
    if sorted(actual) != sorted(subtrees):
        raise ValueError(
            f"config: train.trainable={actual}, but this task trains exactly {list(subtrees)}"
        )
