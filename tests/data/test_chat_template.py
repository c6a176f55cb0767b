"""Templates and tokenizers of folders that others wrote: found, rendered apart, and refused."""

import ast
import json
import shutil

import pytest
from helpers.paths import ROOT

from starflow2_jax.data import chat_layout, chat_template
from starflow2_jax.data.manifest import DatasetError

pytestmark = pytest.mark.fast

SHIPPED = ROOT / "starflow2_jax/pretrained/vlm_tiny"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n{% endfor %}"
)


def edit_json(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a tokenizer without a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=None)
    return tmp_path


@pytest.mark.parametrize("place", ["config", "jinja", "json", "list", "folder", "one"])
def test_a_template_is_found_wherever_a_folder_has_it(folder, place):
    template, config = TEMPLATE, folder / "tokenizer_config.json"
    if place == "config":
        edit_json(config, chat_template=template)
    elif place == "list":
        names = ("default", "tool_use")
        edit_json(config, chat_template=[{"name": n, "template": template} for n in names])
    elif place == "one":
        edit_json(config, chat_template=[{"name": "default", "template": template}])
    elif place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        (folder / "chat_template.jinja").write_text(template)
        if place == "folder":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates/tool_use.jinja").write_text("x")
    tokenizer = chat_layout.open_tokenizer(folder)
    start = [tokenizer.turn_start, *tokenizer.encode("system\nBe brief."), tokenizer.turn_end]
    assert list(tokenizer.opening) == [*start, *tokenizer.encode("\n")]


def test_a_template_that_is_not_understood_is_refused(folder):
    for content in ({"chat_template": 3}, {"x": 1}, [], {"chat_template": [{"name": "a"}]}):
        (folder / "chat_template.json").write_text(json.dumps(content))
        with pytest.raises(DatasetError, match="template"):
            chat_layout.open_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ '%099999999999d' % 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{{ messages.append(1) }}",
        "no turn at all",
        "{% for i in range(9999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}<|im_start|>user",
    ],
)
def test_hostile_templates_are_refused_within_a_limit(folder, template, monkeypatch):
    monkeypatch.setattr(chat_template, "_RENDER", chat_template._RENDER.replace("10)", "1)"))
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(DatasetError, match=r"chat template") as error:
        chat_layout.open_tokenizer(folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[", "[]", '{"a": 1}', '{"chat_template": {"a": {}}}'])
def test_damaged_tokenizer_files_are_one_error(folder, name, content):
    (folder / name).write_text(content)
    try:
        chat_layout.open_tokenizer(folder)
    except DatasetError as error:
        assert str(folder) in str(error)


def test_no_code_of_a_folder_runs(folder, capfd):
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        tokenizer_class="T",
    )
    (folder / "evil.py").write_text(f"open({str(folder / 'OWNED')!r}, 'w')")
    with pytest.raises(DatasetError, match="no tokenizer in this folder"):
        chat_layout.open_tokenizer(folder)
    assert not (folder / "OWNED").exists()


def test_every_call_that_could_run_code_refuses_to():
    calls = []
    for package in ("starflow2_jax", "experiments", "launch", "tests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr not in ("from_pretrained", "from_config", "pipeline"):
                    continue
                safe = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
                # diffusers' models have no code of their own folder, and no such option.
                is_diffusers = ast.unparse(node.func.value).endswith("AutoencoderKL")
                refused = bool(safe) and isinstance(safe[0], ast.Constant) and not safe[0].value
                calls.append((f"{path.relative_to(ROOT)}:{node.lineno}", refused or is_diffusers))
    assert len(calls) > 3
    assert not [location for location, refused in calls if not refused]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = chat_layout.open_tokenizer(folder, 640).vocab_size
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": size, "content": "<a>", "special": False, **token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DatasetError, match=f"the tokenizer has {size + 1} ids, the model 640"):
        chat_layout.open_tokenizer(folder, 640)


def test_a_special_token_that_is_not_marked_as_one_is_refused(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] != "<|im_start|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DatasetError, match=r"reads the text <\|im_start\|> of a user"):
        chat_layout.open_tokenizer(folder)


def test_text_that_is_no_unicode_is_named(folder):
    tokenizer = chat_layout.open_tokenizer(folder)
    for text in ("a \ud800", "\udcff" * 300):
        with pytest.raises(DatasetError, match="lone surrogate at"):
            tokenizer.encode(text)
    with pytest.raises(DatasetError, match=r"here: .*lone surrogate at 2"):
        chat_layout.byte_tokens("a \ud800", 9, "here")
