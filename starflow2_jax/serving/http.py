"""The frame of every route: bodies with limits, errors in OpenAI's form, keys and origins."""

import asyncio
import hmac
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starflow2_jax.serving.errors import RequestError, internal_error
from starflow2_jax.serving.settings import Settings

if TYPE_CHECKING:  # an optional dependency
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

_LOG = logging.getLogger("starflow2_jax.serving")
# A body that takes longer is not read on.
_BODY_SECONDS = 60
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Route = Callable[["HTTPRequest"], Awaitable["Response"]]


@dataclass
class Gate:
    """The checks before a request reaches its route."""

    settings: Settings
    api_key: str = ""  # "" asks for none
    is_local: bool = True  # whether the server is bound to this machine alone
    max_requests: int = 256  # requests that may be handled at a time
    num_requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)  # of all replies

    def check(self, request: "HTTPRequest") -> None:
        """Raise RequestError unless the request may be handled."""
        host = _hostname(f"//{request.headers.get('host', '')}")
        if self.is_local and host not in _LOOPBACK:
            raise RequestError(f"the host {host[:80]!r} is not this machine", 403, code="host")
        origin = request.headers.get("origin")
        if origin is not None and _hostname(origin) != host:
            raise RequestError("requests of other origins are refused", 403, code="origin")
        header = request.headers.get("authorization", "")
        key = header.removeprefix("Bearer ").strip()
        if self.api_key and not hmac.compare_digest(key.encode(), self.api_key.encode()):
            raise RequestError("the API key is missing or wrong", 401, code="invalid_api_key")


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def guarded(route: Route, gate: Gate, *, is_open: bool = False) -> Route:
    """Return a route whose errors become replies; `is_open` ones need no key and are not counted.

    A reply never shows a traceback; the log does.
    """

    async def handle(request: "HTTPRequest") -> "Response":
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        gate.num_requests += not is_open
        try:
            if not is_open:
                gate.check(request)
                if gate.num_requests > gate.max_requests:
                    raise RequestError("too many requests at a time", 429, code="queue_full")
            response = await route(request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception:
            _LOG.exception("%s %s failed", request.method, request.url.path)
            response = error_response(internal_error())
        finally:
            gate.num_requests -= not is_open
        gate.statuses[response.status_code] += 1
        return response

    return handle


def error_response(error: RequestError) -> "Response":
    """Return the reply to a request with an error."""
    from starlette.responses import JSONResponse

    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def read_body(request: "HTTPRequest", settings: Settings, content_type: str) -> bytes:
    """Return the body of a request of this type, unless it is too large or too slow."""
    actual = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if actual != content_type:
        raise RequestError(
            f"content-type is {actual[:80] or 'missing'}, expected {content_type}", 415
        )
    limit = settings.max_bytes
    too_large = RequestError(f"the body has more than {limit} bytes", 413, code="too_large")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large

    async def read() -> bytes:
        pieces, size = [], 0
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise too_large
            pieces.append(piece)
        return b"".join(pieces)

    try:
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except TimeoutError as error:
        raise RequestError(f"the body took more than {_BODY_SECONDS} s", 408) from error


async def read_form(
    request: "HTTPRequest", settings: Settings
) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Return the fields of a multipart form, and the bytes of its files by their names."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    body = await read_body(request, settings, "multipart/form-data")

    async def stream():
        yield body

    try:
        parser = MultiPartParser(
            request.headers,
            stream(),
            max_files=settings.max_input_images,
            max_fields=64,
            max_part_size=settings.max_bytes,
        )
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise RequestError(f"the body is no multipart form: {error}") from error
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields[name] = value
        else:
            files.setdefault(name, []).append(await value.read())
    await form.close()
    return fields, files
