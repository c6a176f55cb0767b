"""Chat templates of a tokenizer's folder: found wherever it has one, and rendered apart.

A template is a program that somebody else wrote. It is rendered in Jinja's sandbox, in a process of
its own with a limit of time and memory.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starflow2_jax.data import untrusted
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.data.tokenizer import TEMPLATE
from starflow2_jax.runtime import json_text

_MAX_BYTES = 1 << 20  # of a template's file
_MAX_CHARACTERS = 1 << 16  # of the rendered text
_SECONDS = 10
_MEMORY = 2 << 30

# Runs in another process: standard input is the JSON of template and variables, standard output
# the JSON of the text.
_RENDER = f"""
import json, re, resource, sys
for limit, value in ((resource.RLIMIT_AS, {_MEMORY}), (resource.RLIMIT_CPU, {_SECONDS})):
    try:
        resource.setrlimit(limit, (value, value))
    except (OSError, ValueError):
        pass
from jinja2.sandbox import ImmutableSandboxedEnvironment

def raise_exception(message):
    raise ValueError(message)

job = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = lambda form: ""
# The mark of an answer's tokens, which transformers adds to the language.
template = re.sub(r"{{%-?\\s*(end)?generation\\s*-?%}}", "", job["template"])
try:
    text = environment.from_string(template).render(**job["variables"])
except Exception as error:
    json.dump({{"error": f"{{type(error).__name__}}: {{error}}"[:300]}}, sys.stdout)
else:
    json.dump({{"text": text[:{_MAX_CHARACTERS} + 1]}}, sys.stdout)
"""


def find_template(folder: str | os.PathLike[str], template: Any) -> str | None:
    """Return the chat template of a folder, None if it has none.

    Args:
        folder: the tokenizer's folder; a processor keeps the template in `chat_template.json`.
        template: transformers' own finding: a text, a dict of named templates, or None.

    Raises:
        DatasetError: There are templates but no default one, or the file is damaged.
    """
    file = Path(folder) / "chat_template.json"
    if template is None and file.exists():
        content = untrusted.decode_json(untrusted.read_file(file, _MAX_BYTES), str(file))
        template = content.get("chat_template") if isinstance(content, dict) else content
        if template is None:
            raise DatasetError(f"{file}: has no `chat_template`; expected one, a text")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(template, Mapping):
        names = list(template)
        template = template.get("default", template[names[0]] if len(names) == 1 else None)
        if template is None:
            raise DatasetError(f"{folder}: has the chat templates {names}, but no 'default'")
    if template is not None and not isinstance(template, str):
        kind = template.__class__.__name__
        raise DatasetError(f"{folder}: the chat template is {kind}, expected a text")
    return template


def opening(folder: str | os.PathLike[str], template: str, special: Mapping[str, str]) -> str:
    """Return the text that a template writes before a user's first turn.

    Args:
        folder: named in errors.
        template: the Jinja template.
        special: names of special tokens, such as `eos_token`, that the template may write.
    """
    if template == TEMPLATE:
        return ""  # of the package's own small models, which start without a process for it
    text = render(str(folder), template, json.dumps(dict(special)))
    start = text.find("<|im_start|>user")
    if start < 0:
        raise DatasetError(
            f"{folder}: the chat template writes no turn <|im_start|>user; expected Qwen's layout"
        )
    return text[:start]


@functools.lru_cache(maxsize=16)
def render(folder: str, template: str, special: str) -> str:
    """Return a template's text for one turn of the user; `special` is a JSON object of names."""
    messages = [{"role": "user", "content": "."}]
    names = json_text.decode(special, folder)
    variables = {**names, "messages": messages, "add_generation_prompt": False}
    job = json.dumps({"template": template, "variables": variables})
    problem = f"{folder}: the chat template cannot be rendered"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            input=job.encode(),
            capture_output=True,
            timeout=2 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetError(f"{problem}: it did not end in {2 * _SECONDS} s") from error
    if done.returncode:
        limit = f"{_SECONDS} s of processor time and {_MEMORY >> 30} GiB"
        raise DatasetError(f"{problem}: it ended with status {done.returncode} (limit: {limit})")
    result = json_text.decode(done.stdout, problem)
    if "error" in result:
        raise DatasetError(f"{problem}: {' '.join(result['error'].split())}")
    if len(result["text"]) > _MAX_CHARACTERS:
        raise DatasetError(f"{problem}: it writes more than {_MAX_CHARACTERS} characters")
    return result["text"]
