"""Visual question answering by scoring, by kind of question, with baselines that see no image.

An answer is correct if each of its tokens, including the end of the turn, is the likeliest after
the question and the answer so far, which is exactly when greedy decoding gives it word for word.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow2_jax.data import packed_batches, records
from starflow2_jax.data.records import Text
from starflow2_jax.evaluation import stats

PROTOCOL = "exact words by greedy decoding; 95% by Wilson's score interval over records"

# A batch of `data.packed_batches` -> `tokens`, `wrong` and `nll` [B, S] of the answers.
ScoreFn = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]
# Metadata of a record that its answer is grouped by, each with its default.
_META_DEFAULTS = {"task": "text", "tag": "all", "withheld": "none"}


class ScoredAnswer(NamedTuple):
    """The scored reference answer of one record."""

    id: str
    task: str
    tag: str
    holdout: str  # what of the record was excluded from training, as `holdout.withheld_kind`
    text: str
    correct: bool
    nll: float  # in nats, summed over the answer's tokens
    tokens: int


def score_answers(
    score_fn: ScoreFn, options: packed_batches.PackedBatchOptions, *, batch_size: int = 16
) -> list[ScoredAnswer]:
    """Score every record of a dataset folder that has target text, in the order of the dataset."""
    scores: dict[str, tuple[bool, float, int]] = {}
    for batch in packed_batches.eval_batches(options, batch_size=batch_size):
        sums = score_fn(batch)
        for row, ids in enumerate(batch["id"]):
            for k, id in enumerate(ids.split("\n") if ids else ()):
                tokens, wrong, nll = (sums[name][row, k] for name in ("tokens", "wrong", "nll"))
                scores[id] = (bool(wrong == 0), float(nll), round(float(tokens)))
    answers = []
    for record in records.read(options.path):
        if record.id not in scores:
            continue  # longer than a row, and within data.skip_long
        correct, nll, tokens = scores[record.id]
        if not tokens:
            continue
        answers.append(_scored_answer(record, correct, nll, tokens))
    return answers


def from_sums(
    rows: Iterable[records.Record],
    sums: Mapping[str, np.ndarray],
    decoded: Mapping[int, str] | None = None,
) -> list[ScoredAnswer]:
    """Return the scored answers of records with target text.

    Args:
        rows: the records.
        sums: `text/count`, `text/correct` and `text/nll` [records], as from
            `interleaved_likelihood.score_records`.
        decoded: the texts of answers that were decoded, by the number of their record. They say
            whether the answer is correct; of other records the sums do.
    """
    answers = []
    for i, record in enumerate(rows):
        nll, tokens = float(sums["text/nll"][i]), round(float(sums["text/count"][i]))
        correct = round(float(sums["text/correct"][i])) == tokens
        if tokens:
            answer = _scored_answer(record, correct, nll, tokens)
            if decoded and i in decoded:
                answer = answer._replace(correct=decoded[i] == answer.text)
            answers.append(answer)
    return answers


def _scored_answer(record: records.Record, correct: bool, nll: float, tokens: int) -> ScoredAnswer:
    text = " / ".join(s.s for s in record.segs if isinstance(s, Text) and s.loss)
    group = [str(record.meta.get(key, default)) for key, default in _META_DEFAULTS.items()]
    return ScoredAnswer(record.id, *group, text, correct, nll, tokens)


def summarize(answers: Sequence[ScoredAnswer]) -> dict[str, dict[str, Any]]:
    """Return the figures of each `task/tag`, and of `all`."""
    groups: dict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in answers:
        groups[f"{answer.task}/{answer.tag}"].append(answer)
    figures = {name: _figures(group) for name, group in sorted(groups.items())}
    # The most frequent answer of all records may depend on the `task/tag`.
    guessed = sum(row["most_frequent"] * row["count"] for row in figures.values())
    most_frequent = round(guessed / len(answers), 4)
    return {**figures, "all": {**_figures(answers), "most_frequent": most_frequent}}


def summarize_by_holdout(answers: Iterable[ScoredAnswer]) -> dict[str, dict[str, Any]]:
    """Return the figures of each kind of holdout; `none` is what training has shown."""
    groups: dict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.holdout].append(answer)
    return {name: _figures(group) for name, group in sorted(groups.items())}


def _figures(answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
    texts = Counter(answer.text for answer in answers)
    nll, tokens = sum(answer.nll for answer in answers), sum(answer.tokens for answer in answers)
    return {
        **stats.accuracy([answer.correct for answer in answers]),
        "nll_per_token": round(nll / tokens, 4),
        "most_frequent": round(texts.most_common(1)[0][1] / len(answers), 4),
    }


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `evaluate understanding` as the lines of a table."""
    baselines = result["baselines"]
    names = [name.replace("_", " ") for name in baselines]
    table = [["", "records", "correct (95%)", "most frequent", *names]]
    for name, row in result["kinds"].items():
        scores = [f"{figures[name]['correct']:.3f}" for figures in baselines.values()]
        table.append([name, *_cells(row), f"{row['most_frequent']:.3f}", *scores])
    for name, row in result["by_holdout"].items():
        table.append([f"held out: {name}", *_cells(row)])
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in table]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['count']:,}", stats.format_figure(row, "correct", ".3f")]
