"""Batched answers of a STARFlow2 to prompts."""

from collections.abc import Callable, Sequence
from typing import Any

from starflow2_jax.inference import generate
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import make_options
from starflow2_jax.inference.prompts import Part

# (prompts, "image", "text" or "both": an image and then text) -> the parts of each answer.
AnswerFn = Callable[[Sequence[Sequence[Any]], str], list[list[Part]]]


def make_answer_fn(
    model: Model,
    *,
    batch_size: int = 96,
    max_tokens: int = 16,
    seed: int = 0,
    **image_options: Any,
) -> AnswerFn:
    """Return a function that answers prompts with a model.

    Text is decoded greedily. The noise of an image depends on the seed and on the position of its
    prompt; no answer depends on `batch_size`, the upper bound on the prompts of a batch.
    `image_options` are fields of `inference.options.GenerateOptions` for answers with an image.
    """
    options_by_kind = {
        "image": {"images": 1, "max_tokens": 0, **image_options},
        "text": {"images": 0, "max_tokens": max_tokens},
        "both": {"images": 1, "image_start": True, "max_tokens": max_tokens, **image_options},
    }

    def answer(prompts: Sequence[Sequence[Any]], kind: str) -> list[list[Part]]:
        if not prompts:
            return []
        options = make_options({"seed": seed, **options_by_kind[kind]})
        num_batches = -(-len(prompts) // batch_size)
        size = -(-len(prompts) // num_batches)
        order = batch_order([_length(model, prompt) for prompt in prompts], size)
        ordered = [list(prompts[i]) for i in order]
        samples = generate.generate_many(model, ordered, options, size, order)
        answers = {i: parts[0] for i, parts in zip(order, samples)}
        return [answers[i] for i in range(len(prompts))]

    return answer


def _length(model: Model, prompt: Sequence[Any]) -> int:
    """Return the number of text tokens and image patches of a prompt."""
    texts = [part for part in prompt if isinstance(part, str)]
    num_tokens = sum(len(model.tokenizer.encode(text)) for text in texts)
    return num_tokens + (len(prompt) - len(texts)) * model.model_config.num_patches


def batch_order(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return an order in which every batch begins with one of the longest prompts.

    Programs are compiled for the longest prompt of a batch, so most batches share one program.
    """
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    num_batches = -(-len(lengths) // batch_size)
    heads, rest = iter(longest[:num_batches]), iter(sorted(longest[num_batches:]))
    return [next(rest if k % batch_size else heads) for k in range(len(lengths))]


def answer_text(parts: Sequence[Part]) -> str:
    """Return the text of an answer."""
    return " ".join(part.text for part in parts if part.kind == "text").strip()


def answer_image(parts: Sequence[Part], name: str) -> Part:
    """Return the image of the answer to the prompt `name`; ValueError if it has no pixels."""
    for part in parts:
        if part.kind == "image" and part.image is not None:
            return part
    raise ValueError(
        f"{name}: the answer has no image with pixels; name the codec's folder with --fae"
    )
