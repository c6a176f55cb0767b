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


def _empty(argument: Any) -> dict[str, Any]:
    """Return an empty dict, the default of `load_params` and `batch_totals`."""
    del argument
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of training, with everything that differs between kinds."""

    model_config: Any  # sizes and options of the network
    declared: Tree  # ParamSpecs of every top-level subtree
    trainable: tuple[str, ...]  # the subtrees with an optimizer
    optimizer: optax.GradientTransformation  # transforms the gradients of the trainable subtrees
    # ShapeDtypeStructs of a batch of `train.batch_size` rows
    abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
    # (trained params, batch, keys [B], StepContext) -> this microbatch's share of the loss of the
    # global batch, summable metrics of each row [B], and what `track` observes
    loss: Callable[[Tree, Batch, jax.Array, StepContext], tuple[jax.Array, Sums, Any]]
    # (all params, batch, keys [B]) -> summable metrics of each row [B]
    evaluate: Callable[[Tree, Batch, jax.Array], Sums]
    # Summed metrics -> readable ones, the most important one first
    finalize_metrics: Callable[[Mapping[str, Any]], dict[str, Any]]
    # (group of keys, `data` or `eval_data`) -> options of `reader`
    data_options: Callable[[str], Any]
    # () -> `tokens` and `flops` of a step; flops is 0 where it is not counted
    step_cost: Callable[[], dict[str, float]]
    # Subtrees that are in the state, and in its checkpoints, without an optimizer. All other
    # subtrees are frozen: an argument of the step, in no checkpoint.
    carried: tuple[str, ...] = ()
    # Device mesh -> the frozen subtrees, and those of the state that `loaded` names
    load_params: Callable[[Mesh], dict[str, Tree]] = _empty
    loaded: tuple[str, ...] = ()  # subtrees of the state whose first values `load_params` reads
    frozen_dtype: Any = jnp.float32  # dtype of the frozen subtrees
    # () -> sha256 of the files of each frozen model, by name
    frozen_identity: Callable[[], dict[str, str]] = dict
    foreign: tuple[str, ...] = ()  # subtrees read from a folder of their own, never `init.from`
    # Path of a model folder -> its parameters, if it does not contain the declared tree
    load_start: Callable[[str], Tree] | None = None
    # Batch -> what the loss of the global batch is divided by
    batch_totals: Callable[[Batch], dict[str, jax.Array]] = _empty
    # (subtrees of the state, observed, summed metrics, step) -> the carried subtrees after the
    # step, for raw and for averaged parameters: `observed` has entries `params` and `ema`
    track: Callable[[Tree, Any, Sums, jax.Array], Tree] | None = None
    # (all params, batch, keys [B]) -> uint8 images [B, H, W, 3]
    reconstruct: Callable[[Tree, Batch, jax.Array], jax.Array] | None = None
    sample_kind: str = ""  # grids of samples: `flow`, `interleaved`, `reconstruction`, or none
    packed: bool = False  # whether a batch consists of packed rows of interleaved records

    @property
    def reader(self) -> ModuleType:
        """The module with `describe`, `batches` and `eval_batches` of this task's data."""
        from starflow2_jax.data import image_batches, packed_batches  # heavy

        return packed_batches if self.packed else image_batches


def check_trainable(cfg: Mapping[str, Any], subtrees: tuple[str, ...]) -> None:
    """Raise ValueError if `train.trainable` is not what a task always trains."""
    actual = list(cfg["train"]["trainable"])
    if sorted(actual) != sorted(subtrees):
        raise ValueError(
            f"config: train.trainable={actual}, but this task trains exactly {list(subtrees)}"
        )
