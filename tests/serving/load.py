"""Load a server on this machine with mixed requests, and compare with one request at a time.

python -m starflow2_jax.serve --port 8000 &
python tests/serving/load.py --port 8000 --clients 64 --seconds 120

`--conversation 8` measures another thing: a conversation in which images are drawn and asked about,
and the time to the first token of each answer. Compare a server with `--sessions 0`.

Every client sends one request after the other: images, questions about an image that was drawn
before, edits of it, and texts. The clients draw their requests from a fixed list with fixed seeds;
`--check` sends every one of them alone at the end, and compares the answers. It prints a table in
Markdown. No address but this machine's is used.
"""

import argparse
import concurrent.futures
import http.client
import json
import statistics
import threading
import time

PROMPTS = (
    "a red circle",
    "a blue square above a green triangle",
    "a large yellow star",
    "two purple circles",
)
QUESTIONS = ("What is in the image?", "How many shapes are there?", "What color is the shape?")


def send(port: int, body: dict) -> tuple[int, dict, float]:
    """Send a chat completion; return its status, body and seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        content = json.loads(response.read())
    finally:
        connection.close()
    return response.status, content, time.perf_counter() - start


def requests_of(port: int, images: list[str]) -> list[tuple[str, dict]]:
    """Return (kind, body) of all requests; `images` are data: URLs that the model has drawn."""
    result = []
    for i, prompt in enumerate(PROMPTS):
        draw = {"messages": [{"role": "user", "content": prompt}], "modalities": ["image"]}
        result += [("draw", {**draw, "seed": 10 * i + k, "guidance": 0.5 * k}) for k in range(3)]
        image = {"type": "image_url", "image_url": {"url": images[i % len(images)]}}
        for k, question in enumerate(QUESTIONS):
            content = [image, {"type": "text", "text": question}]
            body = {"messages": [{"role": "user", "content": content}], "modalities": ["text"]}
            result.append(("ask", {**body, "max_tokens": 24, "seed": k, "temperature": 0.3 * k}))
        content = [image, {"type": "text", "text": "make it blue"}]
        body = {"messages": [{"role": "user", "content": content}], "modalities": ["image"]}
        result.append(("edit", {**body, "seed": i}))
    return result


def run_clients(
    port: int, requests: list[tuple[str, dict]], clients: int, seconds: float
) -> tuple[dict[int, list[tuple[float, object]]], int, float]:
    """Let clients send requests for some seconds.

    Returns:
        (seconds, answer) of the replies by the number of the request, the number of requests that
        found the queue full, and the seconds until the last reply.
    """
    lock, end = threading.Lock(), time.monotonic() + seconds
    replies: dict[int, list[tuple[float, object]]] = {}
    refused = 0

    def client(number: int) -> None:
        nonlocal refused
        i = number * 7
        while time.monotonic() < end:
            index = i % len(requests)
            status, content, taken = send(port, requests[index][1])
            with lock:
                if status == 429:
                    refused += 1
                else:
                    assert status == 200, content
                    choice = content["choices"][0]
                    replies.setdefault(index, []).append((taken, choice["message"]))
            if status == 429:
                time.sleep(0.2)
            else:
                i += 1

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client, number) for number in range(clients)]:
            future.result()
    return replies, refused, time.monotonic() - start


def first_token(port: int, body: dict) -> tuple[float, dict, dict]:
    """Send a streamed request; return the seconds to the first text, the message and the usage."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    start, first = time.perf_counter(), 0.0
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    message = {"role": "assistant", "content": "", "images": [], "parts": []}
    usage = {}
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["images"] += delta.get("images", [])
            message["parts"] += delta.get("parts", [])
            if not first and (delta.get("content") or delta.get("parts")):
                first = time.perf_counter() - start
    connection.close()
    return first, message, usage


def run_conversation(port: int, images: int) -> None:
    """Draw images and ask about them in one conversation; print the times to the first token."""
    messages: list[dict] = []
    print("| answer | prompt | of it kept | s to the first token |")
    print("|---|---|---|---|", flush=True)
    for i in range(images):
        messages.append({"role": "user", "content": PROMPTS[i % len(PROMPTS)]})
        body = {"messages": messages, "modalities": ["image"], "seed": i, "guidance": 0}
        messages.append(first_token(port, body)[1])
        messages.append({"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]})
        body = {"messages": messages, "modalities": ["text"], "max_tokens": 16, "seed": i}
        seconds, message, usage = first_token(port, body)
        messages.append(message)
        prompt, details = usage["prompt_tokens"], usage["prompt_tokens_details"]
        print(f"| {i + 1} | {prompt} | {details['cached_tokens']} | {seconds:.3f} |", flush=True)


def counters(port: int) -> dict[str, float]:
    """Return the metrics of the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def report(name, port, requests, replies, refused, seconds, before) -> None:
    """Print a row of the table."""
    totals = counters(port)
    sampled = sum(
        totals[key] - before[key] for key in ("starflow2_tokens_total", "starflow2_patches_total")
    )
    times = sorted(taken for entries in replies.values() for taken, _ in entries)
    p50, p95 = statistics.median(times), times[min(int(0.95 * len(times)), len(times) - 1)]
    rate = len(times) / seconds
    cpu = totals["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    print(f"| {name} | {len(times)} | {refused} | {rate:.2f} | {sampled / seconds:.0f} "
          f"| {sampled / cpu:.0f} | {p50:.2f} | {p95:.2f} |", flush=True)  # fmt: skip


def main() -> None:
    """Run the load, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--conversation", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.clients <= 256 or not 0 < args.seconds <= 600:
        parser.error("expected at most 256 clients and 600 seconds")
    if args.conversation:
        run_conversation(args.port, args.conversation)
        return
    images = []
    for seed, prompt in enumerate(PROMPTS):
        body = {"messages": [{"role": "user", "content": prompt}], "modalities": ["image"]}
        _, content, _ = send(args.port, {**body, "seed": seed})
        message = content["choices"][0]["message"]
        images.append(message["images"][0]["image_url"]["url"])
    requests = requests_of(args.port, images)
    print(
        "| clients | answers | 429 | answers/s | items/s | items per s of a core | p50 s | p95 s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    all_replies = []
    for clients in (1, args.clients):
        before = counters(args.port)
        replies, refused, seconds = run_clients(args.port, requests, clients, args.seconds)
        report(clients, args.port, requests, replies, refused, seconds, before)
        all_replies.append(replies)
    if args.check:
        wrong = 0
        for index, (_, body) in enumerate(requests):
            expected = send(args.port, body)[1]["choices"][0]["message"]
            for replies in all_replies:
                wrong += sum(message != expected for _, message in replies.get(index, []))
        count = sum(len(entries) for replies in all_replies for entries in replies.values())
        print(f"{wrong} of {count} answers differ from those of the same request alone")


if __name__ == "__main__":
    main()
