"""The result of the suite in plain words: what a model can do, and what it cannot.

A skill is there if the model is above every baseline that has no part in it: if the 95% interval of
the difference, case by case, is above 0 (`accuracy.difference`). Cases are those of kinds that
training has shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starflow2_jax.evaluation import stats
from starflow2_jax.evaluation.report import html

PART = "seen"


@dataclass(frozen=True)
class Skill:
    """Something that a model can or cannot do.

    Attributes:
        path: keys of its figures among the sections of the result.
        ability: completes "It can ...".
        baselines: name in the figures -> in plain words, "than ..." or "with ...".
    """

    path: tuple[str, ...]
    ability: str
    baselines: Mapping[str, str]


_TEXT = {"chance": "chance", "most_frequent": "always the most frequent answer"}
SKILLS = (
    Skill(
        ("generation",),
        "draw what a caption asks for",
        {
            "chance": "chance: the true image of another caption",
            "blank_image": "a blank image",
            "shuffled": "shuffled: its own image for another caption",
        },
    ),
    Skill(
        ("understanding",),
        "answer questions about an image",
        {
            **_TEXT,
            "blank_image": "the same model that sees a blank image",
            "shuffled": "shuffled: the same model that sees the image of another question",
        },
    ),
    Skill(
        ("editing", "preserved"),
        "keep what an edit leaves alone",
        {
            "chance": "chance: the true image of another edit",
            "blank_image": "a blank image",
            "blank_source": "the same model that sees a blank source",
            "shuffled": "shuffled: its own image for another edit",
        },
    ),
    Skill(
        ("editing", "both"),
        "make an edit and keep the rest",
        {
            "chance": "chance: the true image of another edit",
            "copy": "the source, unchanged",
            "blank_source": "the same model that sees a blank source",
            "shuffled": "shuffled: its own image for another edit",
        },
    ),
    Skill(
        ("reasoning",),
        "answer a question through an image that it draws",
        {
            **_TEXT,
            "blank_source": "the same model that sees a blank source",
            "shuffled": "shuffled: the same model that sees the source of another question",
        },
    ),
    Skill(
        ("reasoning",),
        "gain from the image that it has drawn",
        {
            "direct_answer": "its answer at once, without an image",
            "other_image": "its answer after the image that it drew for another question",
        },
    ),
)


def judge(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict on every skill that was measured.

    Each has `ability`, `count`, `correct` and `correct_95` of the model, `above` (all baselines),
    and `baselines`: a list of `what`, `correct`, `difference`, `difference_95` and `above`.
    """
    verdicts = []
    for skill in SKILLS:
        figures = _figures(sections, skill.path)
        if figures is None:
            continue
        rows = []
        for name, what in skill.baselines.items():
            difference = figures["differences"][name][PART]["mean"]
            low, _ = difference["difference_95"]
            correct = figures["baselines"][name][PART]["mean"]["correct"]
            rows.append({"what": what, "correct": correct, **difference, "above": low > 0})
        verdicts.append(
            {
                "ability": skill.ability,
                **figures["score"][PART]["mean"],
                "above": all(row["above"] for row in rows),
                "baselines": rows,
            }
        )
    return verdicts


def _figures(sections: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    figures: Any = sections
    for name in path:
        figures = figures.get(name)
        if figures is None:
            return None
    return figures if figures["score"][PART] is not None else None


def lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one sentence for each skill."""
    return [f"{_sentence(v)} {_score(v)}, {_summary(v)}." for v in verdicts]


def section(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdicts as a part of an HTML page, empty without any."""
    if not verdicts:
        return ""
    parts = [
        "<h2>What it can and cannot do</h2>",
        "<p>Shares of cases that are right, with 95% intervals. A baseline is passed "
        '("above") if the interval of the difference, case by case, is above 0.</p>',
    ]
    for verdict in verdicts:
        kind = "yes" if verdict["above"] else "no"
        parts.append(
            f'<h3 class="{kind}">{html.escape(_sentence(verdict))}</h3>'
            f"<p>{html.escape(_score(verdict))} of {verdict['count']} cases.</p>"
        )
        rows = [
            [
                row["what"],
                f"{row['correct']:.3f}",
                stats.format_figure(row, "difference", "+.3f"),
                "above" if row["above"] else "not above",
            ]
            for row in verdict["baselines"]
        ]
        parts.append(html.table(("compared with", "its share", "difference", ""), rows))
    return "\n".join(parts)


def _sentence(verdict: Mapping[str, Any]) -> str:
    if verdict["above"]:
        return f"It can {verdict['ability']}."
    if any(row["above"] for row in verdict["baselines"]):
        return f"It can only partly {verdict['ability']}."
    return f"It cannot {verdict['ability']}."


def _score(verdict: Mapping[str, Any]) -> str:
    return stats.format_figure(verdict, "correct", ".3f")


def _summary(verdict: Mapping[str, Any]) -> str:
    groups = {
        label: [row["what"].split(":")[0] for row in verdict["baselines"] if row["above"] == above]
        for label, above in (("above", True), ("not above", False))
    }
    return ", ".join(f"{label} ({'; '.join(names)})" for label, names in groups.items() if names)
