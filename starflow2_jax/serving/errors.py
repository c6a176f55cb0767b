"""Errors of requests, in OpenAI's form."""

from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """An error that the client is told about."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the reply."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code or None,
        }
        return {"error": error}


def internal_error() -> RequestError:
    """Return the error of a fault in the server, without its details."""
    return RequestError("the server failed on this request; its log says why", 500)
