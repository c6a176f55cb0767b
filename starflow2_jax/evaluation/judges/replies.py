"""Every reply of a judge, one JSON line each, so that a killed run asks nothing twice."""

import hashlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starflow2_jax.runtime import json_text

FILE = "replies.jsonl"


def digest(model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return the sha256 of a request; equal requests have equal ones."""
    text = json.dumps([model, list(messages), dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Replies:
    """The replies in a folder. Lines are appended, never changed; threads may share it."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._lock = threading.Lock()
        self._texts: dict[str, list[str]] = defaultdict(list)
        if self._path.exists():
            self._read()

    def _read(self) -> None:
        data = self._path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:  # the process was killed while it wrote the last line
            os.truncate(self._path, len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                row = json_text.decode(line, str(self._path))
                self._texts[row["request"]].append(row["reply"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}:{number}: not a reply of a judge") from error

    def texts(self, request: str) -> list[str]:
        """Return the replies to a request so far, in order."""
        with self._lock:
            return list(self._texts[request])

    def add(self, request: str, item: str, question: str, reply: str) -> None:
        """Append a reply."""
        row = {"item": item, "question": question, "request": request, "reply": reply}
        row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._lock:
            self._texts[request].append(reply)
            with self._path.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
