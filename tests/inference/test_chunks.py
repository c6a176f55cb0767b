"""Chunks of a turn: what is shown of them, and rows with other options in one batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.tiny_decode_model import TOKENIZER, VOCAB, image_part

from starflow2_jax.inference import sampling, text_stream
from starflow2_jax.inference.guidance import Guidance

PROMPTS = ["hello", [image_part(1), "what is it?"], [image_part(2), image_part(3), "ab"]]
DRAW = {"max_tokens": 10, "max_images": 2, "temperature": 1.0, "guidance": 1.5, "seed": 3}


def assert_same(actual, expected):
    """Assert that rows of parts have the same tokens and nearly the same latents and nats."""
    for row, expected_row in zip(actual, expected, strict=True):
        assert [(p.kind, p.tokens) for p in row] == [(p.kind, p.tokens) for p in expected_row]
        for a, b in zip(row, expected_row):
            assert (a.log_likelihood or 0) == pytest.approx(b.log_likelihood or 0, abs=1e-8)
            if a.kind == "image":
                np.testing.assert_allclose(a.latent, b.latent, atol=1e-10)


def test_a_function_sees_every_chunk_and_may_end_the_rows(x64):
    model = tiny_decode_model.model()
    options = {**DRAW, "max_tokens": 40}
    plain = model.generate(PROMPTS, **options)
    counts = []

    def watch(items):
        counts.append(sum(map(len, items)))

    assert_same(model.generate(PROMPTS, **options, on_chunk=watch), plain)
    assert len(counts) > 1 and counts == sorted(counts)

    first = model.generate(PROMPTS, **options, on_chunk=lambda items: True)
    assert "interrupted" in first.finish
    for row, full, finish in zip(first, plain, first.finish):
        for part, other in zip(row, full):
            assert part.kind == other.kind and part.tokens == other.tokens[: len(part.tokens)]
        assert not row or row[-1].truncated == (finish != "end")
    # Rows go on from their last whole token or image.
    history = [
        [*(p if isinstance(p, list) else [p]), *row, "so?"] for p, row in zip(PROMPTS, first)
    ]
    second = model.generate(["so?"] * 3, continue_from=first, **DRAW)
    assert_same(second, model.generate(history, **DRAW))


@pytest.mark.fast
def test_text_is_shown_once_no_later_token_can_change_it():
    pieces = {1: b"h", 2: b"\xc3", 3: b"\xa9", 4: b"ab", 5: b"c"}
    decode = lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace")
    tokenizer = dataclasses.replace(TOKENIZER, decode=decode)
    visible = lambda *ids, stop=(): text_stream.stable_text(tokenizer, ids, stop)
    assert [visible(), visible(1), visible(1, 2), visible(1, 2, 3)] == ["", "h", "h", "hé"]
    assert visible(1, 4, stop=("bcd", "x")) == "ha" and visible(1, 4, 5, stop=("abd",)) == "habc"


def test_rows_with_other_parameters_share_a_batch(x64):
    """Check that each row is sampled with its own numbers, whatever those of its neighbors are."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, VOCAB)) * 3)
    scale, mean = (jnp.asarray(rng.standard_normal((8, 3))) for _ in range(2))
    scale, keys = jnp.exp(scale), jax.random.split(jax.random.key(1), 4)
    special, fraction = tiny_decode_model.model().special_tokens, jnp.ones(4)
    may_begin = jnp.asarray([True, False, True, True])
    numbers = {
        "temperature": jnp.asarray([0.0, 1.0, 0.7, 1.3]),
        "top_k": jnp.asarray([0, 0, 5, 3]),
        "top_p": jnp.asarray([1.0, 1.0, 0.9, 1.0]),
        "image_temperature": jnp.asarray([1.0, 0.5, 0.2, 1.1]),
    }
    weight = jnp.asarray([0.0, 1.0, 2.5, 0.3])

    @jax.jit
    def sample(rows, numbers, weight):
        both = jnp.concatenate([rows, rows + 4])
        sampling_params = sampling.SamplingParams(**numbers, guidance=Guidance(weight))
        args = (keys[rows], may_begin[rows], sampling_params, special, jnp.float64)
        patch = sampling.sample_patch(
            scale[both], mean[both], keys[rows], fraction[rows], sampling_params
        )
        return *patch, *sampling.sample_token(logits[rows], *args)

    together = sample(jnp.arange(4), numbers, weight)
    for b in range(4):
        alone = sample(jnp.asarray([b]), {n: v[b] for n, v in numbers.items()}, weight[b])
        for a, expected in zip(together, alone):
            np.testing.assert_allclose(a[b], expected[0], atol=1e-12)
