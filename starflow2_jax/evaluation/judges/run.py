"""Score a tree of images with a judge: check that it is complete, ask, keep replies, summarize."""

import base64
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.benchmarks import items
from starflow2_jax.evaluation.judges import replies as replies_file
from starflow2_jax.evaluation.judges.client import Judge
from starflow2_jax.evaluation.judges.protocol import Item, Protocol, Question, encode
from starflow2_jax.evaluation.judges.protocols import PROTOCOLS
from starflow2_jax.evaluation.judges.replies import Replies
from starflow2_jax.runtime import json_text

SCORES_FILE = "scores.json"
# File of a tree that says how it was generated.
STAMP_FILE = "settings.json"
_MAX_LISTED = 20


class IncompleteTree(ValueError):
    """Images of a tree are missing or damaged, so its score would be that of another set."""

    def __init__(self, tree: Path, problems: Sequence[str]):
        rest = len(problems) - _MAX_LISTED
        more = [f"and {rest} more"] if rest > 0 else []
        lines = "\n  ".join([*problems[:_MAX_LISTED], *more])
        super().__init__(f"{tree} is not complete, so nothing was judged:\n  {lines}")
        self.problems = list(problems)


def check_files(files: Sequence[Path]) -> list[str]:
    """Return what is wrong with image files, one text a file: missing, or not decodable."""
    problems = []
    for path in dict.fromkeys(files):
        if not path.is_file():
            problems.append(f"missing: {path}")
            continue
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            problems.append(f"damaged: {path}: {error}")
    return problems


def score_tree(
    bench: str,
    tree: Path,
    judge: Judge,
    *,
    prompts: Sequence[Path],
    official: Path,
    sources: Path,
    out: Path,
    workers: int = 8,
    on_reply: Callable[[int, int], None] = lambda count, total: None,
) -> dict[str, Any]:
    """Ask a judge about every image of a tree, and return the scores.

    Args:
        bench: a name in `protocols.PROTOCOLS`.
        tree: the folder of images.
        judge: the judge.
        prompts: the benchmark's files of prompts, that the images were generated from.
        official: a checkout of the benchmark, for the prompts of the judge.
        sources: folder of the benchmark's source images, for those that name them by a path.
        out: folder of the replies; those of an earlier run are used.
        workers: requests at once.
        on_reply: called with the number of items so far and in total.

    Raises:
        IncompleteTree: An image is missing or damaged.
        JudgeError: A request has no reply. The replies so far are in `out`.
    """
    protocol = PROTOCOLS[bench]
    rows = protocol.items(prompts)
    names = [protocol.name(item) for item in rows]
    files = {name: protocol.files(item, tree, sources) for name, item in zip(names, rows)}
    if problems := check_files([path for paths in files.values() for path in paths]):
        raise IncompleteTree(tree, problems)
    stamp = _stamp(tree)
    _check_prompts(stamp, prompts, tree)
    texts = protocol.prompts(official)
    replies, failed = Replies(out), threading.Event()

    def ask_item(item: Item) -> dict[str, list[float] | None]:
        name, numbers = protocol.name(item), {}
        try:
            for question in protocol.questions(item, files[name], texts):
                if failed.is_set():  # nothing more is asked once a request has failed
                    break
                numbers[question.name] = _ask(protocol, judge, replies, name, question)
        except BaseException:
            failed.set()
            raise
        return numbers

    numbers = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(ask_item, item) for item in rows]
        try:
            for count, (name, future) in enumerate(zip(names, futures), 1):
                numbers[name] = future.result()
                on_reply(count, len(rows))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    official_files = {name: official / name for name in protocol.prompt_files}
    return {
        "bench": bench,
        **summarize(protocol, rows, numbers),
        "judge": {"model": judge.model, "published_with": protocol.judge},
        "protocol": {
            "checked_against": protocol.commit,
            "official_sha256": {n: _sha256(path) for n, path in official_files.items()},
            "prompts_sha256": {str(path): _sha256(path) for path in prompts},
            "settings": dict(protocol.settings),
            "attempts": protocol.attempts,
        },
        "tree": {"path": str(tree), "stamp": stamp},
    }


def _ask(
    protocol: Protocol, judge: Judge, replies: Replies, name: str, question: Question
) -> list[float] | None:
    """Return the numbers of the first reply that has any, None after all attempts."""
    messages = _messages(question)
    request = replies_file.digest(judge.model, messages, protocol.settings)
    earlier = replies.texts(request)[: protocol.attempts]
    for attempt in range(protocol.attempts):
        if attempt < len(earlier):
            reply = earlier[attempt]
        else:
            reply = judge.ask(messages, protocol.settings)
            replies.add(request, name, question.name, reply)
        numbers = (question.parse or protocol.parse)(reply)
        if numbers:
            return numbers
    return None


def _messages(question: Question) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in question.messages
    ]
    for picture in question.pictures:
        media_type, data = encode(picture)
        url = {"url": f"data:{media_type};base64,{base64.b64encode(data).decode()}"}
        url |= {"detail": picture.detail} if picture.detail else {}
        if picture.label:
            messages[-1]["content"].append({"type": "text", "text": picture.label})
        messages[-1]["content"].append({"type": "image_url", "image_url": url})
    return messages


def summarize(
    protocol: Protocol,
    rows: Sequence[Item],
    numbers: Mapping[str, Mapping[str, list[float] | None]],
) -> dict[str, Any]:
    """Return scores by item and group, the overall ones, and what could not be read.

    Args:
        protocol: the benchmark.
        rows: its items.
        numbers: of each item's name, the numbers of each question; None if unparsable.
    """
    scores, groups, unparsable = {}, defaultdict(list), []
    for item in rows:
        name = protocol.name(item)
        missing = [question for question, row in numbers[name].items() if row is None]
        if missing:
            unparsable.append({"item": name, "questions": missing})
            continue
        scores[name] = protocol.score(item, numbers[name])
        for group in protocol.groups(item):
            groups[group].append(scores[name])
    tables = {group: _means(values) for group, values in sorted(groups.items())}
    figures = {
        group: {key: row[key] for key in row if key != "count" and not key.endswith("_95")}
        for group, row in tables.items()
    }
    return {
        "items": len(rows),
        "scored": len(scores),
        "unparsable": {"count": len(unparsable), "items": unparsable},
        "overall": protocol.summarize(figures) if figures else {},
        "groups": tables,
        "scores": scores,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the mean and interval of every score, over the items that have it."""
    table: dict[str, Any] = {"count": len(rows)}
    for name in dict.fromkeys(name for row in rows for name in row):
        table |= stats.mean(np.array([row[name] for row in rows if name in row]), name)
    return table


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the scores of a tree as lines of text."""
    lines = [
        f"{result['bench']}: {result['scored']} of {result['items']} items scored, "
        f"{result['unparsable']['count']} with replies that cannot be read; "
        f"judge {result['judge']['model']} (published scores: {result['judge']['published_with']})"
    ]
    overall = ", ".join(f"{name} {value:.3f}" for name, value in result["overall"].items())
    lines.append(f"overall    {overall or 'none: not every category has items'}")
    for group, row in result["groups"].items():
        figures = [
            stats.format_figure(row, name, ".3f")
            for name in row
            if name != "count" and not name.endswith("_95")
        ]
        names = [name for name in row if name != "count" and not name.endswith("_95")]
        cells = ", ".join(f"{name} {figure}" for name, figure in zip(names, figures))
        lines.append(f"{group} ({row['count']}): {cells}")
    return lines


def _sha256(path: Path) -> str:
    patterns = ("*.parquet", "*/annotation.json")
    files = sorted(f for p in patterns for f in path.glob(p)) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _check_prompts(stamp: Any, prompts: Sequence[Path], tree: Path) -> None:
    """Raise ValueError if a tree says that it was drawn from other files of prompts."""
    expected = stamp["prompts"]["sha256"] if isinstance(stamp, dict) and "prompts" in stamp else ""
    actual = items.sha256([str(path) for path in prompts])
    if expected and actual != expected:
        raise ValueError(
            f"{tree}: the images were drawn from other prompts: expected sha256 {expected}, got "
            f"{actual}; name the files of --prompts in the same order"
        )


def _stamp(tree: Path) -> Any:
    """Return how a tree was generated, None if it does not say."""
    path = tree / STAMP_FILE
    return json_text.decode(path.read_bytes(), str(path)) if path.exists() else None
