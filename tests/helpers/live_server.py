"""A server on loopback, in threads of the test's process."""

import contextlib
import http.client
import json
import threading
import time


@contextlib.contextmanager
def serve(model, settings, **options):
    """Yield (port, engine) of a server with a random port."""
    import uvicorn

    from starflow2_jax.serving import app
    from starflow2_jax.serving.engine import Engine

    engine = Engine(model, settings)
    config = uvicorn.Config(
        app.build_app(engine, **options),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], engine
    finally:
        server.should_exit = True
        thread.join(30)


def wait_until(is_true, seconds=120.0):
    """Wait until a function returns true."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(0.01)


def send(port, path, body=None, headers=None, method="POST"):
    """Send a request; return its status, the body of the reply (JSON if it is), and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(content) if is_json else content, response.headers
