"""Messages of requests as parts of a conversation: texts, and images of `data:` URLs."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from starflow2_jax.data import images, untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.inference.model import Model
from starflow2_jax.inference.prompts import Part
from starflow2_jax.inference.resize import fit_image
from starflow2_jax.serving import image_store
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.image_store import ImageStore, StoredImage
from starflow2_jax.serving.schemas import ContentPart, ImageURL, Message
from starflow2_jax.serving.settings import Settings

_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
_ROLES = {"developer": "system"}


@dataclass(frozen=True, eq=False)
class Conversation:
    """The parts of a conversation, and its images in order."""

    parts: list[Part]
    images: list[StoredImage]
    digests: list[str]  # sha256 of the images


class MessageReader:
    """A reader of messages, with the model's size of images and the server's caps."""

    def __init__(self, model: Model, store: ImageStore, settings: Settings):
        self._model, self._store, self._settings = model, store, settings

    def read(self, messages: Sequence[Message]) -> Conversation:
        """Return the conversation of messages; images that are not known are encoded.

        Raises:
            RequestError: A message is not what the model can read; names its place.
        """
        result = Conversation([], [], [])
        for i, message in enumerate(messages):
            self._read_message(message, f"messages[{i}]", result)
        return result

    def read_edit(self, sources: Sequence[bytes], prompt: str) -> Conversation:
        """Return the conversation that asks for an edit of encoded images."""
        result = Conversation([], [], [])
        for i, data in enumerate(sources):
            self._add_image(self._pixels(data, f"image[{i}]"), "user", f"image[{i}]", result)
        self._add_text(prompt, "user", "prompt", result)
        return result

    def _read_message(self, message: Message, location: str, result: Conversation) -> None:
        role = _ROLES.get(message.role, message.role)
        content = message.content
        if message.parts is not None:
            for j, part in enumerate(message.parts):
                if part.type == "text":
                    self._add_text(part.text, role, f"{location}.parts[{j}]", result)
                    continue
                place = f"{location}.parts[{j}].image"
                if part.image >= len(message.images or ()):
                    raise RequestError(f"{place}={part.image}: there is no such image", param=place)
                self._add_part(message.images[part.image], role, place, result)
            return
        if isinstance(content, str):
            self._add_text(content, role, f"{location}.content", result)
        for j, part in enumerate(content if isinstance(content, list) else ()):
            self._add_part(part, role, f"{location}.content[{j}]", result)
        for j, part in enumerate(message.images or ()):
            self._add_part(part, role, f"{location}.images[{j}]", result)

    def _add_part(self, part: ContentPart, role: str, location: str, result: Conversation) -> None:
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            self._add_text(part.text, role, location, result)
        elif part.type == "image_url" and part.image_url is not None:
            url = part.image_url.url if isinstance(part.image_url, ImageURL) else part.image_url
            self._add_image(
                self._pixels(data_of_url(url, location), location), role, location, result
            )
        else:
            raise RequestError(
                f"{location}: type {part.type!r} without its content; expected `text` with a text, "
                "or `image_url` with a data: URL",
                param=location,
            )

    def _add_text(self, text: str, role: str, location: str, result: Conversation) -> None:
        try:
            result.parts.append(Part("text", role, untrusted.clean_text(text, location)))
        except DatasetError as error:
            raise RequestError(str(error), param=location) from error

    def _pixels(self, data: bytes, location: str) -> np.ndarray:
        """Return the pixels of an encoded image, in its size."""
        try:
            _, height, width = images.header(data, location)
            if height * width > self._settings.max_pixels:
                raise RequestError(
                    f"{location}: {height} x {width} pixels are more than the "
                    f"{self._settings.max_pixels} that this server takes",
                    param=location,
                )
            return images.decode(data, location)
        except DatasetError as error:
            raise RequestError(str(error), param=location) from error

    def _add_image(
        self, pixels: np.ndarray, role: str, location: str, result: Conversation
    ) -> None:
        model, limit = self._model, self._settings.max_input_images
        if len(result.images) == limit:
            raise RequestError(
                f"{location}: more than the {limit} images that a request may have", param=location
            )
        if model.codec is None:
            raise RequestError(f"{location}: this model reads no images", param=location)
        side, policy = model.codec.model.pixels, self._settings.resize
        try:
            pixels, _ = fit_image(pixels, side, policy, location)
        except ValueError as error:
            raise RequestError(str(error), param=location) from error
        pixels = np.ascontiguousarray(pixels)
        key = image_store.digest(pixels)
        stored = self._store.get(key)
        if stored is None:
            stored = image_store.encode(model, pixels)
            self._store.put(key, stored)
        result.parts.append(stored.part(model, role, pixels))
        result.images.append(stored)
        result.digests.append(key)


def data_of_url(url: str, location: str) -> bytes:
    """Return the bytes of a `data:` URL. No other URL is read."""
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise RequestError(
            f"{location}: expected a URL of the form data:image/png;base64,... (PNG, JPEG or "
            f"WebP); no other URL is fetched, got {url[:40]!r}",
            param=location,
        )
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{location}: not base64: {error}", param=location) from error


def url_of_png(png: bytes) -> str:
    """Return the `data:` URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
