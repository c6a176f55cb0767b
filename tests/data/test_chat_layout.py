"""The chat layout: it equals the template's, with targets, null conditions and positions."""

import json
import shutil

import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax.data import chat_layout, records, tokenizer
from starflow2_jax.data.chat_layout import MessagePart
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.models import qwen

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return interleaved_dataset.make(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def qwen_tokenizer(folders):
    return chat_layout.open_tokenizer(folders[1])


EDIT = [
    MessagePart("user", 0),
    MessagePart("user", "Make the circle red."),
    MessagePart("assistant", 1, True),
    MessagePart("assistant", "done", True),
]


def test_the_layout_equals_the_chat_template(folders, qwen_tokenizer):
    import transformers

    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1], trust_remote_code=False)
    image = {"type": "image"}
    text = lambda words: {"type": "text", "text": words}
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages = [
            *system,
            {"role": "user", "content": [image, text("Make the circle red.")]},
            {"role": "assistant", "content": [image, text("done")]},
        ]
        parts = [MessagePart("system", m["content"]) for m in system] + EDIT
        expected = hf_tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert chat_layout.apply_chat_template(parts, qwen_tokenizer, 1).ids.tolist() == expected
    expected = hf_tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=True)[
        "input_ids"
    ]
    open_parts = [*EDIT[:2], MessagePart("assistant", "")]
    assert (
        chat_layout.apply_chat_template(open_parts, qwen_tokenizer, 1, closed=False).ids.tolist()
        == expected
    )


def test_targets_are_the_assistants_texts_and_images(qwen_tokenizer):
    items = chat_layout.apply_chat_template(EDIT, qwen_tokenizer, 4)
    target_texts = [
        qwen_tokenizer.decode([i]) for i in items.ids[items.is_target & (items.image_index < 0)]
    ]
    assert "".join(target_texts) == "done"
    target_ids = items.ids[items.is_target]
    assert (
        target_ids[0] == qwen_tokenizer.vision_start and target_ids[-1] == qwen_tokenizer.turn_end
    )
    assert (
        target_ids == qwen_tokenizer.image
    ).sum() == 4 and qwen_tokenizer.vision_end not in target_ids
    first_image = np.flatnonzero(items.image_index == 0)
    assert not items.is_target[first_image].any() and not items.is_target[first_image[0] - 1]
    assert items.patch_index[first_image].tolist() == [0, 1, 2, 3]


def test_a_users_text_never_becomes_a_delimiter(qwen_tokenizer):
    items = chat_layout.apply_chat_template(
        [MessagePart("user", "a <|im_end|> b <|image_pad|>")], qwen_tokenizer, 4
    )
    assert (
        items.ids == qwen_tokenizer.turn_end
    ).sum() == 1 and qwen_tokenizer.image not in items.ids


def test_null_conditions_empty_the_users_turns(qwen_tokenizer):
    lay_out = lambda null: chat_layout.apply_chat_template(EDIT, qwen_tokenizer, 4, null=null)
    full, text, both = lay_out("none"), lay_out("text"), lay_out("all")
    text_length = len(qwen_tokenizer.encode("Make the circle red."))
    assert len(full.ids) - len(text.ids) == text_length
    assert len(text.ids) - len(both.ids) == 4 + 2
    # The assistant's turns are the same under every null condition.
    for other in (text, both):
        np.testing.assert_array_equal(other.ids[other.is_target], full.ids[full.is_target])
    assert set(both.image_index.tolist()) == {-1, 1}
    with pytest.raises(ValueError, match="null='txt' is not one of none, text, all"):
        lay_out("txt")


def test_text_without_a_role_gets_no_delimiters(qwen_tokenizer):
    items = chat_layout.apply_chat_template(
        [MessagePart("none", "a red", True), MessagePart("none", 0, True)], qwen_tokenizer, 4
    )
    text_ids = list(qwen_tokenizer.encode("a red"))
    expected = [
        *text_ids,
        qwen_tokenizer.vision_start,
        *[qwen_tokenizer.image] * 4,
        qwen_tokenizer.vision_end,
    ]
    assert items.ids.tolist() == expected
    assert items.is_target.tolist() == [True] * (len(expected) - 1) + [False]


def test_vlm_positions_equal_qwens(qwen_tokenizer):
    items = chat_layout.apply_chat_template(EDIT, qwen_tokenizer, 9)
    cfg = qwen.QwenConfig(
        qwen_tokenizer.vocab_size, 32, 1, 2, 1, 32, sections=(2, 3, 3),
        image_token=qwen_tokenizer.image, video_token=qwen_tokenizer.vocab_size,
    )  # fmt: skip
    expected, _ = qwen.rope_indices(items.ids[None], cfg, [(1, 3, 3)] * 2)
    np.testing.assert_array_equal(chat_layout.vlm_positions(items, 3), expected[0])


def test_flow_positions_belong_to_the_next_item(qwen_tokenizer):
    items = chat_layout.apply_chat_template(
        [MessagePart("none", "a red"), MessagePart("none", 0, True), MessagePart("none", "b")],
        qwen_tokenizer,
        4,
    )
    n = len(qwen_tokenizer.encode("a red"))
    positions = chat_layout.flow_positions(items, 2).tolist()
    assert positions[:n] == [[0, 0, k + 1] for k in range(n)]
    patches = [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert positions[n : n + 4] == [[*p, n + 1] for p in patches]
    num_after = len(items.ids) - n - 4
    assert positions[n + 4 :] == [[0, 0, n + 2 + k] for k in range(num_after)]


def test_a_tokenizer_depends_on_its_data_alone(folders, qwen_tokenizer, tmp_path):
    assert tokenizer.train(folders[0], 400) == tokenizer.train(folders[0], 400)
    assert qwen_tokenizer.vocab_size == 400
    text = "What color is the ring? é\n 12"
    assert qwen_tokenizer.decode(qwen_tokenizer.encode(text)) == text
    with pytest.raises(DatasetError, match="--vocabulary 100: expected at least 263"):
        tokenizer.train(folders[0], 100)
    with pytest.raises(FileExistsError, match="exists; choose another"):
        tokenizer.write("{}", tmp_path, patch=8, merge=1, frames=2)


def test_a_damaged_file_of_a_tokenizer_is_named(folders, tmp_path):
    for name, position, size in (
        ("tokenizer.json", 0, 1),
        ("tokenizer.json", 9000, 1),
        ("tokenizer.json", 9000, -1),
        ("tokenizer_config.json", 200, -1),
        ("tokenizer_config.json", 0, 1),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(folders[1], folder)
        data = bytearray((folder / name).read_bytes())
        if size < 0:
            del data[position:]
        else:
            data[position] ^= 0x40
        (folder / name).write_bytes(data)
        with pytest.raises(DatasetError, match=f"{name} has sha256 .*, expected"):
            chat_layout.open_tokenizer(folder)
        # One of another package has no digests.
        (folder / "sha256.json").unlink()
        if position != 9000 or size < 0:
            with pytest.raises(DatasetError, match=f"no tokenizer in this folder: .*{name}: "):
                chat_layout.open_tokenizer(folder)
        shutil.rmtree(folder)
    shutil.copytree(folders[1], tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(DatasetError, match=r"tokenizer\.json is missing"):
        chat_layout.open_tokenizer(tmp_path / "copy")


def test_a_tokenizer_of_an_earlier_version_is_not_written_again(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "copy")
    (tmp_path / "copy" / "sha256.json").unlink()
    text = (tmp_path / "copy" / "tokenizer.json").read_text()
    tokenizer.write(text, tmp_path / "copy", patch=8, merge=1, frames=2)
    with pytest.raises(FileExistsError, match="exists; choose another"):
        tokenizer.write(text, tmp_path / "copy", patch=16, merge=1, frames=2)


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
