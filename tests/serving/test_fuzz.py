"""Thousands of damaged requests: each is answered with a 4xx, and the server goes on."""

import base64
import io
import json
import random
import resource

import numpy as np
import pytest
from helpers import live_server
from helpers.live_server import send, wait_until
from helpers.starflow2_folders import PIXELS
from PIL import Image

from starflow2_jax.inference import load
from starflow2_jax.serving.settings import Settings

pytest.importorskip("uvicorn", reason="needs the extra [serve]")

VALUES = (
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "a",
    "\0",
    "\ud83d",
    [],
    [[]],
    {},
    {"a": 1},
    ["a"] * 9,
)
SETTINGS = Settings(max_batch=2, lengths=(200,), max_tokens=2, max_samples=2, timeout=60.0)


def encoded_image(rng):
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (PIXELS, PIXELS, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, rng.choice(("PNG", "JPEG", "WEBP")))
    return bytearray(buffer.getvalue())


def damaged(data, rng):
    """Return bytes of which some are changed, left out or repeated."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 12)):
        place = rng.randrange(len(data) or 1)
        action = rng.randrange(4)
        if action == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del data[place : place + rng.randint(1, 40)]
        elif action == 2:
            data[place:place] = data[place : place + rng.randint(1, 40)]
        else:
            del data[place:]
    return bytes(data)


def replace_at_random(value, rng):
    """Return a JSON value in which one place has another value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: replace_at_random(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [replace_at_random(v, rng) if i == place else v for i, v in enumerate(value)]
    return rng.choice(VALUES)


def body_of(rng):
    """Return a body that is damaged in one of three ways."""
    data = encoded_image(rng)
    kind = rng.randrange(3)
    image = damaged(data, rng) if kind == 0 else bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}]
    body = {"messages": [{"role": "user", "content": content}], "n": 1, "seed": 1, "max_tokens": 1,
            "temperature": 1.0, "modalities": ["text"], "stop": ["a"]}  # fmt: skip
    if kind == 1:
        return json.dumps(replace_at_random(body, rng)).encode()
    text = json.dumps(body).encode()
    return damaged(text, rng) if kind == 2 else text


def send_damaged(port, count, seed):
    """Return the numbers of replies by their status."""
    rng, statuses = random.Random(seed), {}
    for _ in range(count):
        path = rng.choice(("/v1/chat/completions",) * 3 + ("/v1/score", "/v1/images/generations"))
        status, reply, _ = send(port, path, body_of(rng))
        # Damage that leaves a valid request is answered.
        assert status == 200 or 400 <= status < 500, reply
        if status != 200:
            message = reply["error"]["message"]
            assert message and "Traceback" not in message and 'File "' not in message
        statuses[status] = statuses.get(status, 0) + 1
    return statuses


@pytest.mark.slow
def test_damaged_requests_leave_the_server_as_it_was(parts):
    with live_server.serve(load.load(parts[1]), SETTINGS) as (port, engine):
        send_damaged(port, 300, seed=0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        statuses = send_damaged(port, 2000, seed=1)
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert statuses.get(400, 0) > 1000 and growth < 100 << 10  # KiB
        wait_until(lambda: not engine.gauges()["rows_used"])
        assert send(port, "/healthz", method="GET")[0] == 200
