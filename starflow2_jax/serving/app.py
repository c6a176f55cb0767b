"""The routes of the server."""

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from starflow2_jax.inference import scoring
from starflow2_jax.serving import chat, metrics, schemas
from starflow2_jax.serving.answer_options import (
    abilities,
    chat_options,
    check_conversation,
    image_options,
)
from starflow2_jax.serving.chat import Heading
from starflow2_jax.serving.content import Conversation, MessageReader, url_of_png
from starflow2_jax.serving.engine import Engine
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.event_stream import EventStream
from starflow2_jax.serving.http import Gate, error_response, guarded, read_body, read_form
from starflow2_jax.serving.requests import PartDone

if TYPE_CHECKING:  # an optional dependency
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response


# The chat page: its files, their types, and what a browser may load for it.
_PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_PAGE_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Routes:
    """The functions that answer requests, with what they share."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.created = engine, name, int(time.time())
        self.model, self.settings = engine.model, engine.settings
        self.reader = MessageReader(engine.model, engine.images, engine.settings)
        self.can = abilities(engine.model)
        # Images of requests are decoded and encoded here, while the engine samples.
        self._threads = ThreadPoolExecutor(1, "starflow2-requests")

    def close(self) -> None:
        """End the thread that reads requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    # ------------------------------------------------------------------------------ generation

    async def chat(self, request: "HTTPRequest") -> "Response":
        """Answer `/v1/chat/completions`."""
        from starlette.responses import JSONResponse, StreamingResponse

        body = await read_body(request, self.settings, "application/json")
        fields = schemas.decode(body, schemas.ChatRequest)
        options = chat_options(fields, self.model, self.can, self.settings)
        conversation = await self._in_thread(self.reader.read, fields.messages)
        check_conversation(conversation, options, self.can)
        heading = Heading.new(self.name, options.seed)
        events = EventStream(self.engine, conversation, options)
        if not fields.stream:
            answers = await chat.collect(events, options.n, request)
            return JSONResponse(chat.completion(heading, answers))
        try:  # An error before the first event has a status of its own.
            first = await events.next(request)
        except BaseException:
            events.close()
            raise
        include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
        pieces = chat.stream(heading, events, first, options.n, include_usage=include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)

    async def generations(self, request: "HTTPRequest") -> "Response":
        """Answer `/v1/images/generations`."""
        body = await read_body(request, self.settings, "application/json")
        fields = schemas.decode(body, schemas.ImagesRequest, ignored=("response_format",))
        return await self._draw(request, fields, [])

    async def edits(self, request: "HTTPRequest") -> "Response":
        """Answer `/v1/images/edits`."""
        fields, files = await read_form(request, self.settings)
        if "mask" in files or "mask" in fields:
            raise RequestError("mask: this server does not support it", param="mask")
        sources = files.get("image", []) + files.get("image[]", [])
        if not sources:
            raise RequestError("image: the form has no file of this name", param="image")
        try:
            typed = msgspec.convert(fields, schemas.ImagesRequest, strict=False)
        except msgspec.ValidationError as error:
            raise RequestError(str(error)) from error
        return await self._draw(request, typed, sources)

    async def _draw(
        self, request: "HTTPRequest", fields: schemas.ImagesRequest, sources: list[bytes]
    ) -> "Response":
        from starlette.responses import JSONResponse

        options = image_options(fields, self.model, self.can, self.settings)
        conversation = await self._in_thread(self.reader.read_edit, sources, fields.prompt)
        events, data = EventStream(self.engine, conversation, options), {}
        try:
            async for event in events.rest(request):
                if isinstance(event, PartDone) and event.png:
                    data[event.answer] = event
        finally:
            events.close()
        images = [self._image_entry(fields, data[i]) for i in range(options.n)]
        return JSONResponse({"created": int(time.time()), "seed": options.seed, "data": images})

    def _image_entry(self, fields: schemas.ImagesRequest, event: PartDone) -> dict[str, Any]:
        entry = {"log_likelihood": event.part.log_likelihood}
        if fields.response_format == "url":
            return {"url": url_of_png(event.png), **entry}
        return {"b64_json": base64.b64encode(event.png).decode(), **entry}

    # --------------------------------------------------------------------------------- scoring

    async def score(self, request: "HTTPRequest") -> "Response":
        """Answer `/v1/score`: the exact log-likelihood of every part of a conversation."""
        from starlette.responses import JSONResponse

        body = await read_body(request, self.settings, "application/json")
        fields = schemas.decode(body, schemas.ScoreRequest)
        conversation = await self._in_thread(self.reader.read, fields.messages)
        nats = await self._in_thread(self._nats, conversation)
        parts = [
            {"role": part.role, "type": part.kind, "log_likelihood": value}
            for part, value in zip(conversation.parts, nats)
        ]
        heading = {"object": "score", "model": self.name}
        return JSONResponse({**heading, "parts": parts, "log_likelihood": sum(nats)})

    def _nats(self, conversation: Conversation) -> list[float]:
        if not any(part.kind == "image" or part.text for part in conversation.parts):
            raise RequestError("messages: all of them are empty", param="messages")
        try:
            parts = self.engine.known_parts(conversation)
            return scoring.log_likelihood(self.model, [parts])[0]
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error

    # ------------------------------------------------------------------------------ the server

    async def models(self, request: "HTTPRequest") -> "Response":
        """Answer `/v1/models`, and `/v1/models/NAME`."""
        from starlette.responses import JSONResponse

        entry = {"id": self.name, "object": "model", "created": self.created,
                 "owned_by": "starflow2_jax"}  # fmt: skip
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [entry]})
        if name != self.name:
            raise RequestError(f"there is no model {name[:80]!r}", 404, code="model_not_found")
        return JSONResponse(entry)

    async def page(self, request: "HTTPRequest") -> "Response":
        """Answer `/` and the files of the chat page."""
        from starlette.responses import Response

        name = request.url.path.removeprefix("/") or "index.html"
        headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        data = (_PAGE / name).read_bytes()
        return Response(data, 200, headers, _PAGE_TYPES[name.rpartition(".")[2]])

    async def health(self, request: "HTTPRequest") -> "Response":
        """Answer `/healthz`."""
        from starlette.responses import JSONResponse

        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)


def build_app(
    engine: Engine, *, name: str = "starflow2", api_key: str = "", is_local: bool = True
) -> "Starlette":
    """Return the application; the engine starts and ends with it.

    Args:
        name: of the model in replies.
        api_key: asked for in every request but those for health and metrics; "" asks for none.
        is_local: whether the server is bound to this machine alone.
    """
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    routes = Routes(engine, name)
    limit = 2 * engine.settings.queue + engine.settings.max_batch
    gate = Gate(engine.settings, api_key, is_local, limit)

    async def show_metrics(request: "HTTPRequest") -> "Response":
        body = metrics.text(engine, gate.statuses)
        return PlainTextResponse(body, media_type="text/plain; version=0.0.4")

    async def http_error(request: "HTTPRequest", error: Any) -> "Response":
        gate.statuses[error.status_code] += 1
        return error_response(
            RequestError(f"{request.url.path}: {error.detail}", error.status_code)
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: "Starlette"):
        engine.start()
        yield
        routes.close()
        await asyncio.to_thread(engine.close)

    def route(path: str, function: Any, method: str = "POST", is_open: bool = False) -> Route:
        return Route(path, guarded(function, gate, is_open=is_open), methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", routes.chat),
            route("/v1/images/generations", routes.generations),
            route("/v1/images/edits", routes.edits),
            route("/v1/score", routes.score),
            route("/v1/models", routes.models, "GET"),
            route("/v1/models/{name:path}", routes.models, "GET"),
            route("/", routes.page, "GET", is_open=True),
            route("/page.css", routes.page, "GET", is_open=True),
            route("/page.js", routes.page, "GET", is_open=True),
            route("/healthz", routes.health, "GET", is_open=True),
            route("/metrics", show_metrics, "GET", is_open=True),
        ],
        exception_handlers={404: http_error, 405: http_error},
        lifespan=lifespan,
    )
