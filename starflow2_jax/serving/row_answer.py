"""One answer while it is sampled: its items, its parts, and the events that tell a client of them.

A part is told of once all parts before it are complete, so events come in the order of the parts.
"""

import dataclasses
from collections.abc import Sequence

from starflow2_jax.inference.model import Model
from starflow2_jax.inference.part_builder import PartBuilder, SampledImage, with_log_det
from starflow2_jax.inference.results import find_stop
from starflow2_jax.inference.text_stream import stable_text
from starflow2_jax.inference.turn import SampledItem
from starflow2_jax.serving.draw import DrawnImage
from starflow2_jax.serving.requests import AnswerDone, Event, PartDone, Request, TextDelta
from starflow2_jax.serving.sessions import SessionRows


class RowAnswer:
    """A candidate for an answer of a request.

    Attributes:
        number: of the candidate, less than n x best_of.
        items: its sampled items.
        finish: as in `inference.results.Results`; empty while the row is sampled.
        session: what the row has read, once it has ended.
    """

    def __init__(self, model: Model, request: Request, number: int, counts: tuple[int, int]):
        """Start an answer; `counts` are the items of the prompt, and those that were not read."""
        self.request, self.number = request, number
        self.items: list[SampledItem] = []
        self.finish, self.session = "", SessionRows({})
        self._model, self._counts = model, counts
        self._builder = PartBuilder(model)
        self._drawn: dict[int, DrawnImage] = {}
        self._num_submitted = 0
        self._part = self._shown = 0  # the part that is told of next, and its characters so far
        self._events: list[Event] = []
        self._is_told = False  # whether the end has been told of

    @property
    def answer(self) -> int:
        """The number of the answer that this is a candidate for."""
        return self.number // self.request.options.best_of

    @property
    def parts(self):
        """The complete parts; images lack latents."""
        return self._builder.parts

    @property
    def is_complete(self) -> bool:
        """True if the row has ended and all images are decoded."""
        return bool(self.finish) and len(self._drawn) >= len(self._builder.images)

    @property
    def log_likelihood(self) -> float:
        """Nats of everything that was sampled."""
        images = (self._drawn[image.part].log_det for image in self._builder.images)
        return float(self._builder.total[0]) + sum(images)

    def add(self, items: Sequence[SampledItem]) -> bool:
        """Add sampled items; return true if a stop text was found, and cut off with its token."""
        self.items += items
        stop = self.request.options.stop
        size = find_stop(self._model, self.items, stop) if stop and items else None
        if size is None:
            self._builder.add(items)
            return False
        del self.items[size:]
        self._builder = PartBuilder(self._model)
        self._builder.add(self.items)
        return True

    def new_images(self) -> list[SampledImage]:
        """Return the images that were complete since the last call."""
        images = self._builder.images[self._num_submitted :]
        self._num_submitted += len(images)
        return images

    def set_drawn(self, part: int, image: DrawnImage) -> None:
        """Add a decoded image."""
        if part < len(self.parts):  # A stop text may have cut it off.
            self._drawn[part] = image
            self.parts[part] = with_log_det(self.parts[part], image.log_det)

    def last_drawn(self) -> DrawnImage | None:
        """Return the last image if it is decoded."""
        images = self._builder.images
        return self._drawn.get(images[-1].part) if images else None

    def drawn_images(self) -> list[DrawnImage]:
        """Return the images in order."""
        return [self._drawn[image.part] for image in self._builder.images]

    def end(self, finish: str, session: SessionRows) -> None:
        """End the answer; `session` is what its row has read."""
        self.finish, self.session = finish, session
        self._builder.end_text()
        if finish == "length" and self.parts:
            self.parts[-1] = dataclasses.replace(self.parts[-1], truncated=True)

    def tell(self) -> None:
        """Emit the events that have not been emitted; keep them if the best candidate counts."""
        events = self._new_events()
        if self.request.options.best_of == 1:
            for event in events:
                self.request.emit(event)
        else:
            self._events += events

    def tell_all(self) -> None:
        """Emit all events that `tell` has kept."""
        for event in self._events:
            self.request.emit(event)

    def _new_events(self) -> list[Event]:
        events: list[Event] = []
        while self._part < len(self.parts):
            part = self.parts[self._part]
            if part.kind == "image":
                image = self._drawn.get(self._part)
                if image is None:
                    return events
                events.append(PartDone(self.answer, part, image.png))
            else:
                if part.text[self._shown :]:
                    events.append(TextDelta(self.answer, self._part, part.text[self._shown :]))
                events.append(PartDone(self.answer, part))
            self._part, self._shown = self._part + 1, 0
        tokens = self._builder.tokens
        text = stable_text(self._model.tokenizer, tokens, self.request.options.stop)
        if text[self._shown :]:
            events.append(TextDelta(self.answer, self._part, text[self._shown :]))
            self._shown = len(text)
        if self.is_complete and not self._is_told:
            self._is_told = True
            events.append(
                AnswerDone(self.answer, self.finish, self.log_likelihood, *self._counts,
                           len(self.items))
            )  # fmt: skip
        return events
