"""How the parts of an interleaved answer are drawn, checked."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starflow2_jax.config import nearest
from starflow2_jax.inference import guidance as guiding
from starflow2_jax.inference.guidance import Guidance


@dataclass(frozen=True)
class GenerateOptions:
    """How parts are drawn.

    A conversation that goes on keeps the `seed`, `samples`, `null` and `cache` it was begun with.

    Attributes:
        n: samples of each prompt; best_of: so many are drawn for each and the likeliest is kept,
            with `best_of_gain` the one that the prompt makes likelier most (the log likelihood
            minus the unconditional one).
        seed: row i is drawn from fold_in(key(seed), i), or the number in `samples` at its place.
        max_tokens: text tokens, ends of turns among them, at most.
        images: exactly so many; None leaves it to the model, up to `max_images`.
        image_start: whether the first item is the beginning of an image.
        stop: texts at which a row ends; they are cut off, with the token they begin in.
        temperature: of tokens, 0 takes the likeliest; top_k: of so many, 0 all; top_p: of the
            fewest that hold this share of the probability.
        guidance: weight w of patches, 0 is none; rule, what, annealed: as in `guidance.Guidance`.
        null: the condition of guidance: `text` without what the user says, `all` without what the
            user shows, too.
        image_temperature: a factor on the noise of patches.
        null_temperature: of the deep flow's attention in the unconditional branch.
        jacobi: a `Jacobi` for the inverse of the shallow flow, None for sequential.
        denoise: a score step on images before they are decoded.
        cache: positions; None takes as many as are needed, and more when the conversation goes on.
    """

    n: int = 1
    best_of: int = 1
    best_of_gain: bool = False
    seed: int = 0
    samples: tuple[int, ...] | None = None
    max_tokens: int = 256
    images: int | None = None
    max_images: int = 4
    image_start: bool = False
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0
    rule: str = "product"
    what: str = "ab"
    annealed: bool = False
    null: str = "text"
    image_temperature: float = 1.0
    null_temperature: float = 1.0
    jacobi: Any = None
    denoise: bool = False
    cache: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", tuple(s for s in self.stop if s))
        wide = (0.0, math.inf)
        for name, low, high, open_ in (
            ("guidance", *wide, False),
            ("temperature", *wide, False),
            ("top_p", 0.0, 1.0, True),
            ("image_temperature", *wide, True),
            ("null_temperature", *wide, True),
        ):
            value = getattr(self, name)
            if not (low < value if open_ else low <= value) or not value <= min(high, 1e6):
                bound = f"{'above' if open_ else 'at least'} {low:g}"
                limit = f" and at most {high:g}" if high < math.inf else ""
                raise ValueError(f"{name}={value!r}: expected a number {bound}{limit}")
        for name, low in (("n", 1), ("best_of", 1), ("top_k", 0), ("max_tokens", 0),
                          ("max_images", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least {low}")
        if self.images is not None and self.images < 0:
            raise ValueError(f"images={self.images!r}: expected at least 0, or None")
        if not self.max_tokens and not self.most_images:
            raise ValueError("max_tokens=0 and no images: there is nothing to draw")
        if self.image_start and not self.most_images:
            raise ValueError("image_start: no image may be drawn")
        if self.null not in ("text", "all"):
            raise ValueError(f"null={self.null!r} is not one of ('text', 'all')")
        guiding.check(Guidance(0.0, rule=self.rule, what=self.what))

    @property
    def most_images(self) -> int:
        """Images of a row at most."""
        return self.max_images if self.images is None else self.images


def sampling_defaults(sample: Mapping[str, Any], **other: Any) -> dict[str, Any]:
    """The options of pictures that a run's own `sample` keys name, but for what is not None of
    those given."""
    own = {
        "guidance": sample["guidance"],
        "rule": sample["guidance_rule"],
        "denoise": sample["denoise"],
        "image_temperature": sample["image_temperature"],
    }
    return own | {name: value for name, value in other.items() if value is not None}


def make_options(given: Mapping[str, Any]) -> GenerateOptions:
    """Options by name; ValueError names an unknown one and the nearest there is."""
    known = [field.name for field in dataclasses.fields(GenerateOptions)]
    for name in given:
        if name not in known:
            raise ValueError(f"generate: unknown option {name!r}{nearest(name, known)}")
    return GenerateOptions(**given)
