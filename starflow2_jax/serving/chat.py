"""`/v1/chat/completions`: answers as messages, whole or streamed.

`content` is a string, images come in `message.images`, and `message.parts` has the order of both
with their log-likelihoods.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starflow2_jax.serving.content import url_of_png
from starflow2_jax.serving.errors import RequestError, internal_error
from starflow2_jax.serving.event_stream import EventStream
from starflow2_jax.serving.requests import AnswerDone, Event, PartDone, TextDelta

if TYPE_CHECKING:  # an optional dependency
    from starlette.requests import Request as HTTPRequest

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


@dataclass
class Answer:
    """One answer, from the events that are there so far."""

    content: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    end: AnswerDone | None = None

    def add(self, event: Event) -> dict[str, Any]:
        """Add an event, and return what it adds to a streamed message."""
        if isinstance(event, TextDelta):
            self.content.append(event.text)
            return {"content": event.text}
        if isinstance(event, AnswerDone):
            self.end = event
        if not isinstance(event, PartDone):
            return {}
        part, nats = event.part, event.part.log_likelihood
        if part.kind == "text":
            if not part.text:  # an answer that ended at once
                return {}
            entry = {"type": "text", "text": part.text, "log_likelihood": nats}
            self.parts.append(entry)
            return {"parts": [entry]}
        number = len(self.images)
        image = {"type": "image_url", "index": number, "image_url": {"url": url_of_png(event.png)}}
        entry = {"type": "image", "image": number, "log_likelihood": nats}
        self.images.append(image)
        self.parts.append(entry)
        return {"images": [image], "parts": [entry]}

    def choice(self, index: int) -> dict[str, Any]:
        """Return the answer as a choice of a chat completion."""
        message = {"role": "assistant", "content": "".join(self.content), "refusal": None}
        message |= {"images": self.images, "parts": self.parts}
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": FINISH_REASONS[self.end.finish],
            "log_likelihood": self.end.log_likelihood,
        }


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Return the numbers of tokens and patches of a request."""
    ends = [answer.end for answer in answers if answer.end is not None]
    prompt = ends[0].prompt_items if ends else 0
    cached = ends[0].cached_items if ends else 0
    sampled = sum(end.sampled_items for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(frozen=True)
class Heading:
    """The fields at the top of every reply to a request."""

    id: str
    model: str
    seed: int
    created: int

    @classmethod
    def new(cls, model: str, seed: int) -> "Heading":
        """Return the heading of a new reply."""
        return cls(f"chatcmpl-{secrets.token_hex(12)}", model, seed, int(time.time()))

    def body(self, kind: str) -> dict[str, Any]:
        """Return the fields for an object of this kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "seed": self.seed}  # fmt: skip


async def collect(events: EventStream, n: int, request: "HTTPRequest") -> list[Answer]:
    """Return the answers of a request once all of them are complete."""
    answers = [Answer() for _ in range(n)]
    try:
        async for event in events.rest(request):
            answers[event.answer].add(event)
    finally:
        events.close()
    return answers


def completion(heading: Heading, answers: list[Answer]) -> dict[str, Any]:
    """Return the body of a reply that is not streamed."""
    choices = [answer.choice(i) for i, answer in enumerate(answers)]
    return {**heading.body("chat.completion"), "choices": choices, "usage": usage(answers)}


async def stream(
    heading: Heading, events: EventStream, first: Event, n: int, *, include_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events: text as it is sampled, and each image when it is decoded.

    A fault after the first event becomes an event with `error`, and the stream ends.
    """
    answers = [Answer() for _ in range(n)]

    def chunk(choices: list[dict[str, Any]], **fields: Any) -> str:
        body = {**heading.body("chat.completion.chunk"), "choices": choices, **fields}
        return f"data: {json.dumps(body)}\n\n"

    def choice(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": None, **fields}

    async def all_events() -> AsyncIterator[Event]:
        yield first
        async for event in events.rest():
            yield event

    try:
        for i in range(n):
            yield chunk([choice(i, {"role": "assistant", "content": ""})])
        async for event in all_events():
            delta = answers[event.answer].add(event)
            if isinstance(event, AnswerDone):
                reason = FINISH_REASONS[event.finish]
                nats = event.log_likelihood
                end = choice(event.answer, {}, finish_reason=reason, log_likelihood=nats)
                yield chunk([end])
            elif delta:
                yield chunk([choice(event.answer, delta)])
        if include_usage:
            yield chunk([], usage=usage(answers))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    except Exception:
        yield f"data: {json.dumps(internal_error().body())}\n\n"
        raise
    finally:
        events.close()
