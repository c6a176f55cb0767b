"""Outcomes of trials, and the table of their counts."""

import dataclasses
from collections import Counter

# Every group of trials has its own columns; those after `good` are failures, but `harmless`.
GROUPS = {
    "kill": ("good", "lost", "half", "refused", "leftover", "traceback", "signal", "hang"),
    "damage": ("good", "harmless", "silent", "unnamed", "traceback", "signal", "hang"),
    "fuzz": ("good", "silent", "unnamed", "traceback", "signal", "hang", "accepted"),
}
HARMLESS = ("good", "harmless", "skipped")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    kind: str  # a column of its group, or `skipped`
    detail: str = ""  # what happened, of a failure

    @property
    def is_failure(self) -> bool:
        """Return True unless all went as it should."""
        return self.kind not in HARMLESS


class Tally:
    """Counts of outcomes by group and target."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}

    def add(self, group: str, target: str, outcome: Outcome) -> None:
        """Count an outcome."""
        self.counts.setdefault((group, target), Counter())[outcome.kind] += 1

    @property
    def failures(self) -> int:
        """Return the number of failures."""
        return sum(
            n
            for counts in self.counts.values()
            for kind, n in counts.items()
            if kind not in HARMLESS
        )

    def table(self) -> str:
        """Return a Markdown table of each group, with a line of totals."""
        return "\n\n".join(
            self._table(group, columns)
            for group, columns in GROUPS.items()
            if any(name == group for name, _ in self.counts)
        )

    def _table(self, group: str, columns: tuple[str, ...]) -> str:
        rows = sorted((t, counts) for (name, t), counts in self.counts.items() if name == group)
        total = sum((counts for _, counts in rows), Counter())
        lines = [
            f"| {group} | trials | {' | '.join(columns)} |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for target, counts in [*rows, (f"all {len(rows)}", total)]:
            trials = sum(n for kind, n in counts.items() if kind != "skipped")
            cells = [target, str(trials), *(str(counts[kind]) for kind in columns)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)
