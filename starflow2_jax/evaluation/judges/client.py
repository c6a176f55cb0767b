"""A client of one OpenAI-compatible address: chat completions with images, retried and kept."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starflow2_jax.runtime import json_text

# The variable that holds the key of the address, so that no command line or result contains it.
KEY_VARIABLE = "JUDGE_API_KEY"
_MAX_REPLY_BYTES = 16 << 20
# Answers that say "later": too many requests, and errors of the server.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)


class JudgeError(RuntimeError):
    """The judge gave no reply: it cannot be reached, refuses the request, or answers no text."""


@dataclass(frozen=True)
class Judge:
    """A judge behind an address."""

    url: str  #: base address, such as `http://127.0.0.1:8000/v1`
    model: str  #: the name that requests ask for
    timeout: float = 300.0  #: seconds for one reply
    retries: int = 4  #: further requests after a passing failure
    pause: float = 2.0  #: seconds before the first of them; doubled before each further one

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge: {self.url!r} is no http address, such as http://HOST:PORT/v1")

    @property
    def endpoint(self) -> str:
        """The address of chat completions; a URL may name it or the folder of version 1."""
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def ask(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
        """Return the text of the reply to messages.

        Raises:
            JudgeError: There is none, after all retries.
        """
        body = json.dumps({"model": self.model, "messages": list(messages), **settings}).encode()
        pause = self.pause
        for attempt in range(self.retries + 1):
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read(2000).decode(errors='replace')}"
                is_final = error.code not in _PASSING
            except (OSError, TimeoutError) as error:
                reason, is_final = str(getattr(error, "reason", error)), False
            if is_final or attempt == self.retries:
                break
            time.sleep(pause)
            pause *= 2
        raise JudgeError(f"{self.endpoint}: {reason}")

    def _send(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.endpoint, body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            data = response.read(_MAX_REPLY_BYTES)
        try:
            text = json_text.decode(data, self.endpoint)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            start = data[:200].decode(errors="replace")
            raise JudgeError(f"{self.endpoint}: not a chat completion: {start}") from error
        if not isinstance(text, str):
            raise JudgeError(f"{self.endpoint}: the reply has no text: {str(text)[:200]}")
        return text
