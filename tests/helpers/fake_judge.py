"""An OpenAI-compatible judge on this machine, whose replies a test chooses."""

import base64
import contextlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow2_jax.evaluation.judges import run
from starflow2_jax.evaluation.judges.client import Judge

# A request's JSON -> (status, text of the reply).
Answer = Callable[[dict[str, Any]], tuple[int, str]]


@contextlib.contextmanager
def serve(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the address of a judge on the loopback interface, and the requests that it receives."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            status, text = answer(body)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def save(path: Path, shade: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    """Write an image of one color, width and height in `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), shade, np.uint8)).save(path)


def texts(body: dict[str, Any]) -> list[str]:
    """Return the texts of a request."""
    return [part["text"] for m in body["messages"] for part in m["content"] if "text" in part]


def pictures(body: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Return the media type and image of every picture of a request."""
    urls = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if "image_url" in p]
    rows = [re.fullmatch(r"data:(image/\w+);base64,(.*)", url).groups() for url in urls]
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in rows]


def score(bench: str, folder: Path, url: str, out: str = "out", **options: Any) -> dict[str, Any]:
    """Score `folder/tree` with a judge; the files of the benchmark are in the same folder."""
    return run.score_tree(
        bench,
        folder / "tree",
        Judge(url, "fake", pause=0.01, retries=2),
        prompts=[folder / "items.json"],
        official=folder / "official",
        sources=folder / "sources",
        out=folder / out,
        workers=2,
        **options,
    )
