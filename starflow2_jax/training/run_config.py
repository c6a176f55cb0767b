"""The groups of configuration keys that training reads, as typed objects (see `config.KEYS`)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starflow2_jax import config


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int
    steps: int
    microbatches: int
    ema: float
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class OptimConfig:
    lr: float
    muon_lr: float
    final_lr: float
    warmup: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class LogConfig:
    every: int
    trackers: tuple[str, ...]
    project: str
    profile_steps: tuple[int, ...]


@dataclass(frozen=True)
class SampleConfig:
    every: int
    count: int
    prompts: tuple[str, ...]
    guidance: float
    guidance_rule: str
    image_temperature: float
    denoise: bool
    spread: bool = False


@dataclass(frozen=True)
class EvaluateConfig:
    every: int
    rows: int
    batch_size: int


@dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int
    keep_every: int


@dataclass(frozen=True)
class RunConfig:
    """The groups of keys that the training loop reads."""

    train: TrainConfig
    optim: OptimConfig
    log: LogConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    checkpoint: CheckpointConfig


def run_config(cfg: Mapping[str, Any]) -> RunConfig:
    """Return the groups of a checked configuration as typed objects."""
    groups = {
        f.name: config.build(f.type, cfg[f.name], f.name, least=0)
        for f in dataclasses.fields(RunConfig)
    }
    return RunConfig(**groups)
