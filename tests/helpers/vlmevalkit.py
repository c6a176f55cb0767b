"""Requests that VLMEvalKit sends to an OpenAI-compatible server, restated from its code.

`run.py --base-url URL/v1 --model NAME --data SET` posts them to `URL/v1/chat/completions`
(`vlmeval/api/lmdeploy.py` and `openai_sdk.py`, read at commit e8e78f0): images first, as JPEG data
URLs whose short side is at least 100 pixels, then the text; `n=1`, temperature 0 and 32,768 tokens.
It reads `choices[0].message.content`, which must be a text, or the deltas of a stream (`--stream`),
and asks again if the answer is empty. The files in golden/vlmevalkit/ hold such bodies.
"""

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from helpers.paths import GOLDEN

FOLDER = GOLDEN / "vlmevalkit"
NAMES = ("working", "multiple_choice", "open_question", "two_images", "streamed")
MAX_TOKENS, MIN_EDGE = 2**15, 100
MODEL = "starflow2"


def read(name: str) -> dict[str, Any]:
    """Return the body of a request."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def body(text: str, images: list[np.ndarray] | None = None, **changes: Any) -> dict[str, Any]:
    """Return the body for a text and images uint8 [H, W, 3]."""
    urls = [{"url": f"data:image/jpeg;base64,{_jpeg(image)}"} for image in images or ()]
    content = [{"type": "image_url", "image_url": url} for url in urls]
    content.append({"type": "text", "text": text})
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "n": 1,
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0,
        **changes,
    }


def multiple_choice(question: str, options: dict[str, str]) -> str:
    """Return the text of a question with options, from a row of the columns question, A, B, ..."""
    lines = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    end = "Please select the correct answer from the options above. \n"
    return f"Question: {question}\nOptions:\n{lines}{end}"


def read_reply(status: int, reply: bytes, *, is_streamed: bool) -> str:
    """Return the answer that VLMEvalKit takes from the bytes of a reply.

    Raises:
        ValueError: It would ask again: a status of failure, no text, or an empty one.
    """
    if not 200 <= status < 300:
        raise ValueError(f"status {status}: {reply[:300]!r}")
    if is_streamed:
        deltas = []
        for line in reply.decode().splitlines():
            data = line.strip().removeprefix("data:").strip()
            if data == "[DONE]":
                break
            choices = json.loads(data).get("choices") if line.startswith("data:") else None
            deltas.append((choices[0].get("delta", {}).get("content") or "") if choices else "")
        answer = "".join(deltas).strip()
    else:
        answer = json.loads(reply)["choices"][0]["message"]["content"].strip()
    if not answer:
        raise ValueError("an empty answer")
    return answer


def _jpeg(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    factor = MIN_EDGE / min(image.size)
    if factor > 1:
        image = image.resize((int(image.width * factor), int(image.height * factor)))
    out = io.BytesIO()
    image.save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()
