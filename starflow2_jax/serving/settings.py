"""Settings of a server: its capacity, and the caps on what a request may ask for."""

from dataclasses import dataclass

from starflow2_jax.inference.row_caches import SPARE_SLOTS

# Lengths of caches are multiples of this.
_SLOT_STEP = 64


@dataclass(frozen=True)
class Settings:
    """Capacity of the server, and caps on requests."""

    max_batch: int = 8  #: rows that are sampled together; a row with guidance counts twice
    lengths: tuple[int, ...] = ()  #: items of a row, prompt and answer; each is a program
    queue: int = 64  #: requests that may wait; one more is answered with 429
    sessions: int = 16  #: conversations whose caches are kept
    stored_images: int = 4096  #: images whose latents are kept
    chunk: int = 16  #: steps between two looks at the queue, and two pieces of a streamed text
    max_tokens: int = 1024  #: cap on the text tokens of an answer; larger numbers are clamped
    max_images: int = 4  #: cap on the images of an answer
    max_samples: int = 16  #: cap on n x best_of
    max_input_images: int = 16  #: cap on the images of a request
    max_pixels: int = 1 << 24  #: cap on the pixels of an image
    max_bytes: int = 32 << 20  #: cap on the bytes of a request
    timeout: float = 300.0  #: seconds until a request ends, time in the queue included
    resize: str = "pad"  #: what happens to images of another size, a policy of `inference.resize`


def default_lengths(num_patches: int) -> tuple[int, ...]:
    """Return a length for a short exchange with two images, and one for a conversation."""
    short = 320 + 5 * (num_patches + 2)
    short = -(-short // _SLOT_STEP) * _SLOT_STEP
    return short, 4 * short


def slots(length: int) -> int:
    """Return the slots of a cache for rows of so many items."""
    return -(-(length + SPARE_SLOTS) // _SLOT_STEP) * _SLOT_STEP
