"""The JSON bodies of requests: OpenAI's fields, and a few of this server's.

Unknown fields are ignored, as clients send many. Fields that would change the answer, and that the
server does not support, are refused by `check_unsupported`.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from starflow2_jax.serving.errors import RequestError

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Amount = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Number = Annotated[float, Meta(ge=0, le=1e6)]
Probability = Annotated[float, Meta(gt=0, le=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=200)]
StopTexts = Annotated[list[StopText], Meta(max_length=16)]


class ImageURL(Struct):
    """An image as a `data:` URL."""

    url: str
    detail: str | None = None


class ContentPart(Struct):
    """A text or an image of a message."""

    type: str = ""
    text: str | None = None
    image_url: ImageURL | str | None = None


class AnswerPart(Struct):
    """A part of an answer, as `message.parts` lists it: a text, or the number of an image."""

    type: Literal["text", "image"]
    text: str = ""
    image: Amount = 0


class Message(Struct):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    images: list[ContentPart] | None = None  #: of an answer that is sent back
    parts: list[AnswerPart] | None = None  #: the order of texts and images in that answer


class StreamOptions(Struct):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class SamplingFields(Struct, kw_only=True):
    """Fields of every request that generates."""

    model: str | None = None
    n: Count | None = None
    seed: Seed | None = None
    guidance: Number | None = None
    image_temperature: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    best_of: Count | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text", "image"]] | None = None
    stop: StopText | StopTexts | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Probability | None = None
    top_k: Amount | None = None
    images: Amount | None = None  #: exact number of images
    max_images: Amount | None = None


class ImagesRequest(SamplingFields, kw_only=True):
    """The body of `/v1/images/generations`."""

    prompt: Annotated[str, Meta(min_length=1)]
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None


class ScoreRequest(Struct):
    """The body of `/v1/score`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None


# Fields of OpenAI's that would change the answer, and values that do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "mask": (None,),
}


def decode(body: bytes, kind: type[Struct], *, ignored: tuple[str, ...] = ()) -> Any:
    """Return the JSON body of a request as a `kind`.

    `ignored` are fields that this kind has, though others do not support them.
    """
    try:
        fields = msgspec.json.decode(body)
        if not isinstance(fields, dict):
            raise RequestError("the body is not a JSON object")
        for name, harmless in _UNSUPPORTED.items():
            if name not in ignored and fields.get(name) not in harmless:
                raise RequestError(f"{name}: this server does not support it", param=name)
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        path = re.search(r"`\$\.?(.*)`", str(error))
        param = path.group(1) if path else None
        raise RequestError(str(error), param=param or None) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
