"""Chat from a local folder: template, images, refusals. Runs with or without torch."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from helpers.qwen_parity import causal_mask
from PIL import Image

from starflow2_jax.checkpoints.convert import qwen as table
from starflow2_jax.inference import qwen_chat
from starflow2_jax.models import qwen, qwen_vision
from starflow2_jax.params import init as init_params

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole checkpoint: weights, tokenizer, image processor, template."""
    import tokenizers
    import transformers

    path = tmp_path_factory.mktemp("chat")
    bytes_ = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *bytes_])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    cfg = qwen.QwenConfig(
        vocab=len(vocabulary),
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        sections=(1, 1, 2),
        image_token=5,
        video_token=6,
        vision_start_token=3,
        vision_end_token=4,
        vision=qwen_vision.VisionConfig(
            depth=2, width=16, heads=2, mlp_width=24, out_width=32, full_layers=(1,), patch=4,
            window=16,
        ),
    )  # fmt: skip
    source = path / "processor"
    tokenizer.save_pretrained(source)
    # As published: named by model, which a torch-free transformers can open too.
    (source / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "patch_size": 4,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "size": {"shortest_edge": 64, "longest_edge": 4096},
            }
        )
    )
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    params = init_params(jax.random.key(0), qwen.declare(cfg))
    table.export(params, cfg, path / "model", processor=source)
    return path / "model"


@pytest.fixture(scope="module")
def opened(folder):
    cfg, params = table.load(folder)
    return cfg, params, qwen_chat.open_processor(folder)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def user(*parts):
    kinds = [
        {"type": "text", "text": p} if isinstance(p, str) and not p.startswith("/") else
        {"type": "image", "image": p} for p in parts
    ]  # fmt: skip
    return [{"role": "user", "content": kinds}]


def test_a_conversation_with_images(opened, tmp_path):
    cfg, params, processor = opened
    Image.fromarray(picture(24, 40)).save(tmp_path / "a.png")
    rows = [
        user("what is", str(tmp_path / "a.png"), "?"),
        [{"role": "system", "content": "short"}, *user(picture(16, 16), picture(33, 50), "é")],
    ]
    prompt = qwen_chat.prepare(processor, rows, cfg)
    # 24 x 40 is kept, 16 x 16 too, 33 x 50 becomes 32 x 48: multiples of 8.
    assert prompt.grids.tolist() == [[1, 6, 10], [1, 4, 4], [1, 8, 12]]
    assert prompt.ids.shape[1] % qwen_chat.LENGTH_STEP == 0
    ids = [row[keep] for row, keep in zip(prompt.ids, prompt.valid)]
    pad = "<|image_pad|>"
    texts = [processor.tokenizer.decode(row) for row in ids]
    seen = "<|vision_start|>" + pad * 15 + "<|vision_end|>"
    start, end = "<|im_start|>", "<|im_end|>\n"
    assert texts[0] == f"{start}user\nwhat is{seen}?{end}{start}assistant\n"
    two = "".join(f"<|vision_start|>{pad * n}<|vision_end|>" for n in (4, 24))
    assert texts[1] == f"{start}system\nshort{end}{start}user\n{two}é{end}{start}assistant\n"
    assert not prompt.valid[0, 0] and prompt.valid[:, -1].all()
    mine = qwen_vision.patchify(qwen_vision.normalize(picture(24, 40)), cfg.vision)
    np.testing.assert_allclose(prompt.patches[:60], mine, atol=2e-6)
    # The first token is that of the uncached model.
    at = qwen_vision.plan(prompt.grids, cfg.vision)
    logits = qwen.forward(
        params, prompt.ids, cfg, patches=prompt.patches, plan=at, positions=prompt.positions,
        mask=causal_mask(prompt.valid),
    )  # fmt: skip
    rows_of = qwen_chat.generate(params, cfg, prompt, max_tokens=4)
    assert [row[0] for row in rows_of] == np.argmax(logits[:, -1], -1).tolist()
    said = qwen_chat.chat(params, cfg, processor, rows, max_tokens=4, stop=())
    assert said == processor.tokenizer.batch_decode(rows_of, skip_special_tokens=True)


def test_a_conversation_alone_and_in_company(opened):
    cfg, params, processor = opened
    rows = [user("a"), user(picture(16, 24), "what a long question this is, and no end of it")]
    together = qwen_chat.generate(
        params, cfg, qwen_chat.prepare(processor, rows, cfg), max_tokens=8
    )
    for row, tokens in zip(rows, together):
        alone = qwen_chat.generate(
            params, cfg, qwen_chat.prepare(processor, [row], cfg), max_tokens=8
        )
        assert alone[0] == tokens


def test_what_ends_a_turn(folder, opened, tmp_path):
    assert opened[2].stop == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    try:
        assert qwen_chat.open_processor(folder).stop == (2, 0)
    finally:
        (folder / "generation_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        qwen_chat.open_processor(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no tokenizer or image processor can be read"):
        qwen_chat.open_processor(tmp_path)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": 3}],
            "conversation 0, message 0: expected a role and content",
        ),
        ([*user("a"), {"content": "b"}], "conversation 0, message 1: expected a role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part 0: expected text or an image, "),
        (user("/no/such.png"), r"/no/such\.png: no such file"),
        (user(np.zeros((8, 8), np.uint8)), r"part 0: expected uint8 \[H, W, 3\], got uint8 \[8, 8"),
        (user(np.zeros((8, 8, 3), np.float32)), r"got float32 \[8, 8, 3\]"),
        (user(b"GIF89a"), "not a JPEG, PNG or WebP image"),
        (user(np.broadcast_to(np.uint8(0), (9000, 9000, 3))), "9000 x 9000 pixels are more than"),
        (user(png(Image.new("1", (9000, 9000)))), "the image is 9000 x 9000 pixels, at most"),
        (user("<|image_pad|>"), "0 images were given, its text holds 1 image tokens"),
        (user("<|video_pad|>"), "video tokens; only text and images"),
    ],
)
def test_conversations_that_are_refused(opened, messages, message):
    cfg, _, processor = opened
    with pytest.raises(ValueError, match=message):
        qwen_chat.prepare(processor, [messages], cfg)


def test_images_that_the_tower_cannot_read(opened):
    cfg, _, processor = opened
    rows = [user(picture(24, 42))]
    coarse = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, patch=8, window=32))
    with pytest.raises(ValueError, match=r"cuts \(patch, merge, frames\) = \(4, 2, 2\), the tower"):
        qwen_chat.prepare(processor, rows, coarse)
    with pytest.raises(ValueError, match="a model that has no vision tower"):
        qwen_chat.prepare(processor, rows, dataclasses.replace(cfg, vision=None))
    processor.images.do_resize = False
    try:
        with pytest.raises(ValueError, match="24 x 42 pixels; the vision tower needs multiples"):
            qwen_chat.prepare(processor, rows, cfg)
    finally:
        processor.images.do_resize = True
    with pytest.raises(ValueError, match="none were given"):
        qwen_chat.prepare(processor, [], cfg)
