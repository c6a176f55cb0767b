"""The style of the package, the experiments and the tests: plain names, docstrings, short files."""

import ast
import functools
import re

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.fast

SOURCES = [
    path
    for folder in ("starflow2_jax", "experiments", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Words that say nothing about a value: a participle, a pronoun or an adverb is no name.
VAGUE_WORDS = """
after asked at began beside drawn due each eyes few following found given heat held here kept
learnt made many mine now of others ours own said seen shown theirs there told wanted warm way
ways where whole wide
"""
VAGUE_NAMES = frozenset(VAGUE_WORDS.split())
RELATIVE_PRONOUNS = ("What ", "Of ", "Where ", "Whether ", "How ", "Who ", "That ")
MISSING_FILES = re.compile(r"\b(paper|design)\.md\b")
MAX_LINES = 450


def bound_names(tree):
    """Yield (name, line) of every function, class, parameter, variable and attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def docstrings(tree):
    """Yield (docstring, line) of the module and of every class and function in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring, node.body[0].lineno


@functools.cache
def read_sources():
    """Return (path, text, syntax tree) of every file."""
    texts = {path: path.read_text("utf-8") for path in SOURCES}
    return [(path, text, ast.parse(text)) for path, text in texts.items()]


def offenders(check):
    """Return `file:line: text` for every (line, text) that `check(source text, tree)` yields."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path, source, tree in read_sources()
        for line, text in check(source, tree)
    ]


def test_names_say_what_a_value_is():
    names = offenders(
        lambda text, tree: ((line, name) for name, line in bound_names(tree) if name in VAGUE_NAMES)
    )
    assert not names, "name these by what they are:\n" + "\n".join(names)


def test_docstrings_are_sentences():
    starts = offenders(
        lambda text, tree: (
            (line, docstring.splitlines()[0])
            for docstring, line in docstrings(tree)
            if docstring.startswith(RELATIVE_PRONOUNS)
        )
    )
    assert not starts, "begin these with a verb, or with a noun for a class:\n" + "\n".join(starts)


def test_files_that_are_not_in_the_repository_are_not_named():
    references = offenders(
        lambda text, tree: (
            (number, line.strip())
            for number, line in enumerate(text.splitlines(), 1)
            if MISSING_FILES.search(line)
        )
    )
    assert not references, "refer to docs/method.md or the arXiv section:\n" + "\n".join(references)


def test_files_are_short():
    long = offenders(
        lambda text, tree: [(1, f"{n} lines")] if (n := text.count("\n")) > MAX_LINES else []
    )
    assert not long, f"split these; a file has at most {MAX_LINES} lines:\n" + "\n".join(long)
