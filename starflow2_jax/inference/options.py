"""Validated options of interleaved generation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starflow2_jax.config import checks, nearest
from starflow2_jax.inference import guidance
from starflow2_jax.inference.guidance import Guidance
from starflow2_jax.inference.inverse import Jacobi

_NULL_PROMPTS = ("text", "all")
_MAX_NUMBER = 1e6
MAX_SAMPLES = 1_000_000  # rows of a prompt; more do not fit into any memory
_RANGES = {
    "n": (1, MAX_SAMPLES),
    "best_of": (1, MAX_SAMPLES),
    "top_k": (0, checks.MAX_INT),
    "max_tokens": (0, checks.MAX_INT),
    "max_images": (0, checks.MAX_INT),
    "images": (0, checks.MAX_INT),
    "cache": (0, checks.MAX_INT),
    "seed": (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `STARFlow2.generate`.

    A continued session keeps the `seed`, `samples`, `null` and `cache` of its first call.
    """

    n: int = 1  #: samples per prompt
    best_of: int = 1  #: candidates per sample; the one with the largest log-likelihood is returned
    best_of_gain: bool = False  #: rank candidates by the log-likelihood minus the unconditional one
    seed: int = 0  #: row i draws its noise from fold_in(key(seed), i)
    samples: tuple[int, ...] | None = None  #: numbers to use in place of i, one per row
    max_tokens: int = 256  #: maximum number of text tokens, end-of-turn tokens included
    images: int | None = None  #: exact number of images; None leaves it to the model
    max_images: int = 4  #: maximum number of images if `images` is None
    image_start: bool = False  #: begin the answer with an image
    stop: tuple[str, ...] = ()  #: texts that end a row, cut off with the token they begin in
    temperature: float = 0.0  #: temperature of text tokens; 0 is greedy
    top_k: int = 0  #: sample from the k most likely tokens; 0 is all of them
    top_p: float = 1.0  #: sample from the most likely tokens that hold this probability mass
    guidance: float = 0.0  #: guidance weight of patches; 0 is none
    rule: str = "product"  #: guidance rule, see `guidance.Guidance`
    null: str = "text"  #: the unconditional branch omits the user's text; `all`: images as well
    image_temperature: float = 1.0  #: factor on the standard deviation of patches
    jacobi: Jacobi | None = None  #: inversion of the shallow flow; None inverts it sequentially
    denoise: bool = False  #: apply a score step to images before they are decoded
    cache: int | None = None  #: positions of the key-value cache; None lets it grow on demand

    def __post_init__(self):
        object.__setattr__(self, "stop", tuple(s for s in self.stop if s))
        _check_number("guidance", self.guidance, minimum=0.0)
        _check_number("temperature", self.temperature, minimum=0.0)
        _check_number("top_p", self.top_p, above=0.0, maximum=1.0)
        _check_number("image_temperature", self.image_temperature, above=0.0)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            is_default = value is None and name in ("images", "cache")
            if not is_default and not checks.is_whole(value, low, high):
                raise ValueError(
                    f"{name}={checks.display(value)}: expected a whole number from {low} to {high}"
                )
        if self.copies > MAX_SAMPLES:
            raise ValueError(
                f"n={self.n} x best_of={self.best_of}: expected at most {MAX_SAMPLES} rows"
            )
        if not self.max_tokens and not self.image_limit:
            raise ValueError("max_tokens=0 and no images: there is nothing to generate")
        if self.image_start and not self.image_limit:
            raise ValueError("image_start=True needs images: images or max_images is 0")
        if self.null not in _NULL_PROMPTS:
            raise ValueError(f"null={self.null!r} is not one of {_NULL_PROMPTS}")
        guidance.check(Guidance(0.0, rule=self.rule))

    @property
    def image_limit(self) -> int:
        """The maximum number of images in a row."""
        return self.max_images if self.images is None else self.images

    @property
    def copies(self) -> int:
        """The number of rows that are drawn for each prompt."""
        return self.n * self.best_of

    @property
    def needs_null_branch(self) -> bool:
        """True if the unconditional branch has to run."""
        return bool(self.guidance) or self.best_of_gain


def _check_number(
    name: str,
    value: float,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> None:
    """Raise ValueError unless value >= minimum or value > above, and value <= maximum."""
    bound = f"at least {minimum:g}" if above is None else f"above {above:g}"
    is_low = not value >= minimum if above is None else not value > above
    limit = "" if maximum is None else f" and at most {maximum:g}"
    if is_low or not value <= (_MAX_NUMBER if maximum is None else maximum):
        raise ValueError(f"{name}={value!r}: expected a number {bound}{limit}")


def sampling_defaults(sample: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Return the image options of a run's `sample` group, with overrides that are not None."""
    defaults = {
        "guidance": sample["guidance"],
        "rule": sample["guidance_rule"],
        "denoise": sample["denoise"],
        "image_temperature": sample["image_temperature"],
    }
    return defaults | {name: value for name, value in overrides.items() if value is not None}


def make_options(values: Mapping[str, Any]) -> GenerateOptions:
    """Return the options of a mapping; ValueError names an unknown key and the nearest known."""
    known = [field.name for field in dataclasses.fields(GenerateOptions)]
    for name in values:
        if name not in known:
            raise ValueError(f"generate: unknown option {name!r}{nearest(name, known)}")
    return GenerateOptions(**values)
