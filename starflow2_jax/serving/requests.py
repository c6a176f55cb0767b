"""Requests of the engine, and the events by which it answers them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.inference.prompts import Part
from starflow2_jax.serving.content import Conversation
from starflow2_jax.serving.errors import RequestError


@dataclass(frozen=True)
class TextDelta:
    """More text of an answer."""

    answer: int  # number of the answer, less than `n`
    part: int  # number of the part within the answer
    text: str


@dataclass(frozen=True)
class PartDone:
    """A part of an answer that is complete, with its likelihoods, and an image as PNG."""

    answer: int
    part: Part
    png: bytes = b""


@dataclass(frozen=True)
class AnswerDone:
    """The end of an answer."""

    answer: int
    finish: str  # as in `inference.results.Results`
    log_likelihood: float  # nats of everything that was sampled
    prompt_items: int  # number of tokens and patches before the answer
    cached_items: int  # of these, those that were not read again
    sampled_items: int  # number of sampled tokens and patches


@dataclass(frozen=True)
class Failed:
    """The end of a request that cannot be answered; no other event follows."""

    error: RequestError


Event = TextDelta | PartDone | AnswerDone | Failed


@dataclass(eq=False)
class Request:
    """A conversation, and how its answers are sampled."""

    conversation: Conversation
    options: GenerateOptions
    emit: Callable[[Event], None]  # called by the engine's thread
    deadline: float  # in seconds of `time.monotonic`
    arrival: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    notes: dict[str, Any] = field(default_factory=dict)  # of the engine

    @property
    def is_late(self) -> bool:
        """True after the deadline."""
        return time.monotonic() > self.deadline
