"""The fields of requests as options of generation, with the server's caps."""

import secrets
from dataclasses import dataclass
from typing import Any

from starflow2_jax.inference.model import Model, adapter_is_trained, flow_is_trained
from starflow2_jax.inference.options import GenerateOptions, sampling_defaults
from starflow2_jax.serving.content import Conversation
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.schemas import ChatRequest, ImagesRequest, SamplingFields
from starflow2_jax.serving.settings import Settings

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Abilities:
    """Uses that a model was trained for."""

    draws: bool
    sees: bool


def abilities(model: Model) -> Abilities:
    """Return what a model was trained for, and has a codec for."""
    has_decoder = model.codec is not None and "pixel_decoder" in model.codec.params
    return Abilities(
        draws=has_decoder and flow_is_trained(model),
        sees=model.codec is not None and adapter_is_trained(model),
    )


def chat_options(
    chat: ChatRequest, model: Model, can: Abilities, settings: Settings
) -> GenerateOptions:
    """Return the options of a chat completion."""
    modalities = chat.modalities or (["text", "image"] if can.draws else ["text"])
    if "image" in modalities and not can.draws:
        raise RequestError("modalities: this model draws no images", param="modalities")
    images, limit = chat.images, settings.max_images
    if images is not None and images > limit:
        raise RequestError(f"images={images}: at most {limit}", param="images")
    if "image" not in modalities:
        if images:
            raise RequestError(f"images={images}, but modalities has no image", param="images")
        images = 0
    elif "text" not in modalities and not images:
        images = 1
    tokens = chat.max_completion_tokens or chat.max_tokens or DEFAULT_TOKENS
    stop = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
    return _options(
        chat,
        model,
        settings,
        draws=images != 0,
        images=images,
        max_images=min(limit if chat.max_images is None else chat.max_images, limit),
        max_tokens=min(tokens, settings.max_tokens) if "text" in modalities else 0,
        temperature=chat.temperature or 0.0,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        top_k=chat.top_k or 0,
        stop=stop,
    )


def image_options(
    fields: ImagesRequest, model: Model, can: Abilities, settings: Settings
) -> GenerateOptions:
    """Return the options of a request for images alone."""
    if not can.draws:
        raise RequestError("this model draws no images")
    side = model.codec.model.pixels
    if fields.size not in (None, "auto", f"{side}x{side}"):
        raise RequestError(
            f"size={fields.size!r}: this model draws images of {side}x{side}", param="size"
        )
    return _options(fields, model, settings, draws=True, images=1, max_tokens=0)


def _options(
    fields: SamplingFields, model: Model, settings: Settings, *, draws: bool, **options: Any
) -> GenerateOptions:
    n, best_of = fields.n or 1, fields.best_of or 1
    if n * best_of > settings.max_samples:
        limit = settings.max_samples
        raise RequestError(f"n={n} x best_of={best_of}: at most {limit} samples", param="n")
    image = sampling_defaults(
        model.cfg["sample"], guidance=fields.guidance, image_temperature=fields.image_temperature
    )
    if not draws:
        image["guidance"] = 0.0  # texts are sampled without
    seed = secrets.randbits(31) if fields.seed is None else fields.seed
    try:
        return GenerateOptions(**image, n=n, best_of=best_of, seed=seed, **options)
    except ValueError as error:
        raise RequestError(str(error)) from error


def check_conversation(
    conversation: Conversation, options: GenerateOptions, can: Abilities
) -> None:
    """Raise RequestError unless the model can answer a conversation."""
    if conversation.parts and conversation.parts[-1].role == "assistant":
        raise RequestError(
            "messages: the last one is the assistant's, so there is nothing to answer; "
            "expected one of the user",
            param="messages",
        )
    if not any(part.kind == "image" or part.text for part in conversation.parts):
        raise RequestError("messages: all of them are empty", param="messages")
    # The flow reads the image of an edit by itself.
    if conversation.images and options.max_tokens and not can.sees:
        raise RequestError("messages: this model was not trained to see images", param="messages")
