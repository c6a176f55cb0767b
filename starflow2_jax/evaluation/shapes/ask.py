"""Cases put to a model, many at a time by few compiled programs."""

from collections.abc import Callable, Sequence
from typing import Any

from starflow2_jax.evaluation.shapes.cases import Case
from starflow2_jax.inference import generate
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.options import make_options
from starflow2_jax.inference.prompts import Part

# (prompts, what is to follow: a picture, words, or a picture and then words) -> parts of each.
Ask = Callable[[Sequence[Sequence[Any]], str], list[list[Part]]]
KINDS = ("picture", "words", "both")


def asker(
    model: Model,
    *,
    rows: int = 96,
    max_tokens: int = 16,
    seed: int = 0,
    **drawing: Any,
) -> Ask:
    """Asks a model; words are the likeliest, pictures are drawn from the seed and their place.

    Args:
        rows: prompts together at most, which change no answer; max_tokens: of an answer in words.
        drawing: of pictures, `guidance` and others of `inference.options.GenerateOptions`.
    """
    own = {
        "picture": {"images": 1, "max_tokens": 0, **drawing},
        "words": {"images": 0, "max_tokens": max_tokens},
        "both": {"images": 1, "image_start": True, "max_tokens": max_tokens, **drawing},
    }

    def ask(given: Sequence[Sequence[Any]], kind: str) -> list[list[Part]]:
        if not given:
            return []
        options = make_options({"seed": seed, **own[kind]})
        together = -(-len(given) // -(-len(given) // rows))
        order = _order([_length(model, prompt) for prompt in given], together)
        turned = [list(given[i]) for i in order]
        answers = generate.generate_many(model, turned, options, together, order)
        return [row for _, row in sorted(zip(order, (a[0] for a in answers)), key=lambda p: p[0])]

    return ask


def _length(model: Model, prompt: Sequence[Any]) -> int:
    words = [part for part in prompt if isinstance(part, str)]
    texts = sum(len(model.tokenizer.encode(text)) for text in words)
    return texts + (len(prompt) - len(words)) * model.model_config.patches


def _order(lengths: Sequence[int], together: int) -> list[int]:
    """Places such that each `together` prompts begin with one of the longest: as programs are
    compiled for the longest of a batch, all batches share one."""
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    count = -(-len(lengths) // together)
    heads, rest = iter(longest[:count]), iter(sorted(longest[count:]))
    return [next(rest if k % together else heads) for k in range(len(lengths))]


def said(parts: Sequence[Part]) -> str:
    """The words of an answer."""
    return " ".join(part.text for part in parts if part.kind == "text").strip()


def drawn(parts: Sequence[Part], case: Case) -> Part:
    """The picture of an answer.

    Raises:
        ValueError: there is none, or it has no pixels; names the case.
    """
    for part in parts:
        if part.kind == "image" and part.image is not None:
            return part
    raise ValueError(f"case {case.id}: no picture was drawn; is there a codec (--fae)?")
