"""How many questions about pictures a model answers right, by kind, beside what needs no eyes.

An answer is right where every one of its tokens, the end of the turn included, is the likeliest
after the question and the answer so far: exactly where greedy decoding gives it word for word.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import packed_batches, records
from starflow2_jax.data.records import Text

PROTOCOL = "exact words by greedy decoding; 95% by Wilson's score interval over records"

Score = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]


class Answer(NamedTuple):
    """One record's answers: of which `task` and `tag`, what of it is `withheld` from training, the
    `words` that are right, whether the model gave them, and `nats` of its `tokens` tokens."""

    id: str
    task: str
    tag: str
    withheld: str
    words: str
    right: bool
    nats: float
    tokens: int


def answers(
    score: Score, opts: packed_batches.PackedBatchOptions, *, batch_size: int = 16
) -> list[Answer]:
    """Every record of a dataset that has words to learn, in its order.

    Args:
      score: a batch of `data.packed_batches` -> `tokens`, `wrong` and `nll` of each record, [B, S].
      opts: one dataset folder; its `mixture` is empty.
    """
    found: dict[str, tuple[bool, float, int]] = {}
    for batch in packed_batches.eval_batches(opts, batch_size=batch_size):
        held = score(batch)
        for row, ids in enumerate(batch["id"]):
            for place, id in enumerate(ids.split(" ") if ids else ()):
                tokens, wrong, nats = (held[k][row, place] for k in ("tokens", "wrong", "nll"))
                found[id] = (wrong == 0, float(nats), round(float(tokens)))
    told = []
    for record in records.read(opts.path):
        right, nats, tokens = found[record.id]
        if not tokens:
            continue
        words = " / ".join(s.s for s in record.segs if isinstance(s, Text) and s.loss)
        kind = [str(record.meta.get(key, default)) for key, default in _META]
        told.append(Answer(record.id, *kind, words, bool(right), nats, tokens))
    return told


_META = (("task", "text"), ("tag", "all"), ("withheld", "none"))


def summarise(told: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """By `task/tag`, and `all`: how many, the share that is right with its 95% interval, nats per
    token, and how many the most frequent words of the kind would get right."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in told:
        groups[f"{answer.task}/{answer.tag}"].append(answer)
    table = {name: _figures(group) for name, group in sorted(groups.items())}
    whole = _figures(told)
    # Of each kind its own most frequent words: what can be known without looking.
    guessed = sum(row["most_frequent"] * row["count"] for row in table.values())
    return {**table, "all": {**whole, "most_frequent": round(guessed / len(told), 4)}}


def by_withheld(told: Iterable[Answer]) -> dict[str, dict[str, Any]]:
    """Figures of what training has shown (`none`) and of what it has not, apart."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in told:
        groups[answer.withheld].append(answer)
    return {name: _figures(group) for name, group in sorted(groups.items())}


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `evaluate understanding` as a table."""
    others = result["baselines"]
    head = ["records", "right", "95%", "most frequent", *(n.replace("_", " ") for n in others)]
    rows_ = [["", *head]]
    for name, row in result["kinds"].items():
        beside = [f"{table[name]['right']:.3f}" for table in others.values()]
        rows_.append([name, *_cells(row), f"{row['most_frequent']:.3f}", *beside])
    for name, row in result["by_withheld"].items():
        rows_.append([f"withheld: {name}", *_cells(row)])
    widths = [max(len(row[i]) for row in rows_ if i < len(row)) for i in range(len(rows_[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows_]


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["right_95"]
    return [f"{row['count']:,}", f"{row['right']:.3f}", f"{low:.3f}-{high:.3f}"]


def wilson(right: int, count: int) -> list[float]:
    """95% interval of a share of `count` independent trials (Wilson's score interval)."""
    if not count:
        return [0.0, 1.0]
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    return [round(float(max((middle - half) / scale, 0.0)), 4),
            round(float(min((middle + half) / scale, 1.0)), 4)]  # fmt: skip


def _figures(group: Sequence[Answer]) -> dict[str, Any]:
    right, count = sum(answer.right for answer in group), len(group)
    frequent = Counter(answer.words for answer in group).most_common(1)[0][1]
    return {
        "count": count,
        "right": round(right / count, 4),
        "right_95": wilson(right, count),
        "nats_per_token": round(sum(a.nats for a in group) / sum(a.tokens for a in group), 4),
        "most_frequent": round(frequent / count, 4),
    }
