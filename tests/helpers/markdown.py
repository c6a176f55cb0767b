"""The pages of the documentation and the code in them."""

import pathlib
import re
from typing import NamedTuple

from helpers.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")),
    ROOT / "starflow2_jax/pretrained/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(r"(?:^<!-- skip-test: ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A fenced block: its language, its text, and why no test runs it (empty if one does)."""

    page: pathlib.Path
    language: str
    text: str
    skip: str

    def lines(self) -> list[str]:
        """Return the lines of the block, continued ones joined."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page: pathlib.Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(page, language, text, skip)
        for skip, language, text in _BLOCK.findall(page.read_text())
    ]


def spans(page: pathlib.Path) -> list[str]:
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)
