"""The events of one request of the engine, as the routes await them."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starflow2_jax.inference.options import GenerateOptions
from starflow2_jax.serving.content import Conversation
from starflow2_jax.serving.engine import Engine
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.requests import AnswerDone, Event, Failed, Request

if TYPE_CHECKING:  # an optional dependency
    from starlette.requests import Request as HTTPRequest

# Seconds between two looks at whether the client is still there.
_POLL_SECONDS = 0.25


class EventStream:
    """The events of a request until all its answers are complete.

    The request is dropped when `close` is called or the client leaves.
    """

    def __init__(self, engine: Engine, conversation: Conversation, options: GenerateOptions):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._engine, self._open_answers, self._next_look = engine, options.n, 0.0
        deadline = time.monotonic() + engine.settings.timeout
        self._request = Request(conversation, options, emit, deadline)
        engine.submit(self._request)

    def close(self) -> None:
        """Drop the request unless it is complete."""
        if self._open_answers:
            self._engine.cancel(self._request)

    async def next(self, http_request: "HTTPRequest | None" = None) -> Event:
        """Return the next event.

        Args:
            http_request: watched for a client that leaves; None if something else watches it.

        Raises:
            RequestError: The request has failed.
        """
        while True:
            if http_request is not None and time.monotonic() > self._next_look:
                self._next_look = time.monotonic() + _POLL_SECONDS
                if await http_request.is_disconnected():
                    self.close()
                    raise RequestError("the client has left", 499)
            try:
                event = await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
            except TimeoutError:
                continue
            if isinstance(event, Failed):
                self._open_answers = 0
                raise event.error
            self._open_answers -= isinstance(event, AnswerDone)
            return event

    async def rest(self, http_request: "HTTPRequest | None" = None) -> AsyncIterator[Event]:
        """Yield all further events."""
        while self._open_answers:
            yield await self.next(http_request)
