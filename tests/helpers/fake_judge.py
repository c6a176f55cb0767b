"""An OpenAI-compatible judge on this machine, whose replies a test chooses."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
