"""The chat layout: that of the template, with its targets, nulls and positions."""

import json

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import chat_layout, records, tokenizer
from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.models import qwen


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return interleaved_dataset.make(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def held(folders):
    return chat_layout.open_tokenizer(folders[1])


EDIT = [
    MessagePart("user", 0),
    MessagePart("user", "Make the circle red."),
    MessagePart("assistant", 1, True),
    MessagePart("assistant", "done", True),
]


def test_it_writes_what_the_template_writes(folders, held):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folders[1])
    image = {"type": "image"}
    text = lambda words: {"type": "text", "text": words}
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages = [
            *system,
            {"role": "user", "content": [image, text("Make the circle red.")]},
            {"role": "assistant", "content": [image, text("done")]},
        ]
        parts = [MessagePart("system", m["content"]) for m in system] + EDIT
        wanted = theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert chat_layout.apply_chat_template(parts, held, 1).ids.tolist() == wanted
    wanted = theirs.apply_chat_template(messages[1:2], add_generation_prompt=True)["input_ids"]
    opened = [*EDIT[:2], MessagePart("assistant", "")]
    assert chat_layout.apply_chat_template(opened, held, 1, closed=False).ids.tolist() == wanted


def test_targets_are_what_the_assistant_does(held):
    items = chat_layout.apply_chat_template(EDIT, held, 4)
    said = [held.decode([i]) for i in items.ids[items.is_target & (items.image_index < 0)]]
    assert "".join(said) == "done"
    learnt = items.ids[items.is_target]
    assert learnt[0] == held.vision_start and learnt[-1] == held.turn_end
    assert (learnt == held.image).sum() == 4 and held.vision_end not in learnt
    first = np.flatnonzero(items.image_index == 0)
    assert not items.is_target[first].any() and not items.is_target[first[0] - 1]
    assert items.patch_index[first].tolist() == [0, 1, 2, 3]


def test_what_a_user_writes_is_never_a_delimiter(held):
    items = chat_layout.apply_chat_template(
        [MessagePart("user", "a <|im_end|> b <|image_pad|>")], held, 4
    )
    assert (items.ids == held.turn_end).sum() == 1 and held.image not in items.ids


def test_nulls_empty_the_user(held):
    count = lambda null: chat_layout.apply_chat_template(EDIT, held, 4, null=null)
    whole, text, both = count("none"), count("text"), count("all")
    words = len(held.encode("Make the circle red."))
    assert len(whole.ids) - len(text.ids) == words
    assert len(text.ids) - len(both.ids) == 4 + 2
    # What the assistant does is the same under all of them.
    for other in (text, both):
        np.testing.assert_array_equal(other.ids[other.is_target], whole.ids[whole.is_target])
    assert set(both.image_index.tolist()) == {-1, 1}
    with pytest.raises(ValueError, match="null='txt' is not one of none, text, all"):
        count("txt")


def test_text_without_a_role_stands_as_it_is(held):
    items = chat_layout.apply_chat_template(
        [MessagePart("none", "a red", True), MessagePart("none", 0, True)], held, 4
    )
    said = list(held.encode("a red"))
    wanted = [*said, held.vision_start, *[held.image] * 4, held.vision_end]
    assert items.ids.tolist() == wanted
    assert items.is_target.tolist() == [True] * (len(wanted) - 1) + [False]


def test_positions_are_qwens(held):
    items = chat_layout.apply_chat_template(EDIT, held, 9)
    cfg = qwen.QwenConfig(
        held.vocab_size, 32, 1, 2, 1, 32, sections=(2, 3, 3), image_token=held.image,
        video_token=held.vocab_size,
    )  # fmt: skip
    wanted, _ = qwen.rope_indices(items.ids[None], cfg, [(1, 3, 3)] * 2)
    np.testing.assert_array_equal(chat_layout.vlm_positions(items, 3), wanted[0])


def test_flow_positions_are_those_of_the_next_item(held):
    items = chat_layout.apply_chat_template(
        [MessagePart("none", "a red"), MessagePart("none", 0, True), MessagePart("none", "b")],
        held,
        4,
    )
    n = len(held.encode("a red"))
    found = chat_layout.flow_positions(items, 2).tolist()
    assert found[:n] == [[0, 0, k + 1] for k in range(n)]
    patches = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert found[n : n + 4] == [[*p, n + 1] for p in patches]
    rest = len(items.ids) - n - 4
    assert found[n + 4 :] == [[0, 0, n + 2 + k] for k in range(rest)]


def test_a_tokenizer_depends_on_its_data_alone(folders, held, tmp_path):
    assert tokenizer.train(folders[0], 400) == tokenizer.train(folders[0], 400)
    assert held.vocab_size == 400
    text = "What color is the ring? é\n 12"
    assert held.decode(held.encode(text)) == text
    with pytest.raises(DatasetError, match="--vocabulary 100: expected at least 263"):
        tokenizer.train(folders[0], 100)
    with pytest.raises(FileExistsError, match="exists; choose another"):
        tokenizer.write("{}", tmp_path, patch=8, merge=1, frames=2)


def test_a_folder_without_delimiters_is_refused(folders, tmp_path):
    with pytest.raises(DatasetError, match="no tokenizer in this folder"):
        chat_layout.open_tokenizer(tmp_path)
    other = tmp_path / "other"
    text = tokenizer.train(folders[0], 400).replace("<|im_start|>", "<|start|>")
    tokenizer.write(text, other, patch=8, merge=1, frames=2)
    with pytest.raises(DatasetError, match=r"the tokenizer has no <\|im_start\|>"):
        chat_layout.open_tokenizer(other)


def test_parts_of_a_record_number_its_images_in_turn(folders):
    for record in records.read(folders[0]):
        parts, images = chat_layout.message_parts(record)
        numbers = [p.content for p in parts if isinstance(p.content, int)]
        assert numbers == list(range(len(images))) and len(parts) == len(record.segs)
    assert json.loads(json.dumps(images)) == images
