"""Every text that is no JSON ends in one error that names its place, and no code decodes alone."""

import ast

import pytest
from helpers.paths import ROOT

from starflow2_jax.runtime import json_text

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[" * 100_000, '{"a":' * 100_000, b'{"a": "\xff"}', b"\xff\xfe", "{'a': 1}"],
    ids=["empty", "open", "deep", "deep object", "no UTF-8", "half a mark", "no quotes"],
)
def test_an_error_names_the_place(text):
    with pytest.raises(ValueError, match=r"^run/metrics\.jsonl: not JSON: "):
        json_text.decode(text, "run/metrics.jsonl")
    assert json_text.decode('{"a": [1, null]}', "here") == {"a": [1, None]}


def test_no_other_module_decodes_json():
    """`json.loads` raises RecursionError for deep nesting, and never names a file."""
    calls = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "starflow2_jax").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
    ]
    assert calls == ["starflow2_jax/runtime/json_text.py"]
