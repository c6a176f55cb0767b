"""Sampled images are read again, clean, before a conversation goes on, as in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.tiny_decode_model import SIDE, TOKENIZER, image_part

from starflow2_jax.data import chat_layout
from starflow2_jax.inference import decode_loop, scoring
from starflow2_jax.inference.image_latents import encode_images, shallow_forward
from starflow2_jax.inference.prompts import Part
from starflow2_jax.models import backbone, starflow2
from starflow2_jax.models.backbone import BackboneInputs
from starflow2_jax.training.losses import interleaved

PROMPTS = [[image_part(1), "make it red"], ["draw"], [image_part(2), image_part(3), "a"], ["hello"]]
OPTIONS = {"images": 1, "image_start": True, "max_tokens": 7, "temperature": 1.0, "seed": 2}


def as_list(prompt):
    return [Part("text", "user", prompt)] if isinstance(prompt, str) else [
        Part("text", "user", p) if isinstance(p, str) else p for p in prompt
    ]  # fmt: skip


def scored_caches(model, history):
    """Return the caches of a conversation laid out for scoring, and its batch."""
    cfg = model.model_config
    batch, _ = scoring.build_batch(
        model,
        [history],
        *encode_images(model, [history], jax.random.split(jax.random.key(0), 1), [0]),
    )
    x = batch["latent_mean"]
    u = shallow_forward(model.params, x[0], cfg)[0][None]
    inputs = BackboneInputs(
        ids=batch["ids"],
        latents=starflow2.latents_at_positions(jnp.asarray(u), batch["image"]),
        adapter_input=None,
        is_image=batch["image"] >= 0,
        positions=batch["positions"],
        next_positions=batch["flow_positions"],
        item_positions=backbone.item_positions(
            BackboneInputs(*[None] * 5, batch["flow_positions"], segments=batch["segments"])
        ),
    )
    params = model.decode_params
    state = decode_loop.empty_state(params, cfg, 1, batch["ids"].shape[1], has_null_branch=False)
    caches, _ = decode_loop.prefill(
        params, state.caches, state.valid, inputs, batch["segments"] > 0, cfg=cfg
    )
    return caches, batch


@pytest.mark.parametrize("guidance, key_positions", ((0.0, "own"), (1.0, "next")))
def test_what_decoding_reads_is_what_scoring_reads(x64, guidance, key_positions):
    """Compare keys and values of all layers, after two turns with an image and text in each."""
    flow = {"key_positions": key_positions}
    model = tiny_decode_model.model(context_sigma=0.0, flow=flow)
    results = model.generate(PROMPTS, **OPTIONS, guidance=guidance)
    histories = [[*as_list(p), *row] for p, row in zip(PROMPTS, results)]
    seconds = ["brighter", [image_part(4), "like this"], "more", "go on"]
    results = model.generate(seconds, continue_from=results, **OPTIONS, guidance=guidance)
    histories = [[*h, *as_list(p), *row] for h, p, row in zip(histories, seconds, results)]
    num_copies = []
    for b, history in enumerate(histories):
        expected, batch = scored_caches(model, history)
        state = results.session.state
        slots = np.flatnonzero(np.asarray(state.valid[b]))
        assert len(slots) > 60
        for cache, reference in zip(state.caches, expected):
            for actual, a in zip(
                (*cache.keys, *cache.values), (*reference.keys, *reference.values)
            ):
                actual = np.asarray(actual)[b][..., slots, :]
                a = np.asarray(a)[..., : len(slots), :]
                np.testing.assert_allclose(actual, a.reshape(actual.shape), atol=1e-10)
        is_target, is_copy = interleaved.target_images(batch)
        latents = batch["latent_mean"][0]
        images = [part for part in history if part.kind == "image"]
        clean = [part.clean_latent for part in images if part.clean_latent is not None]
        for slot, latent in zip(np.flatnonzero(is_copy[0]), clean):
            np.testing.assert_allclose(latents[slot], latent, atol=1e-10)
            assert np.abs(latents[slot] - latents[slot - 1]).max() > 1e-3
        read = [part.latent for part in images if part.role == "user"]
        slots = np.flatnonzero(~is_target[0] & ~is_copy[0])[: len(read)]
        np.testing.assert_array_equal(latents[slots], np.reshape(read, (-1, SIDE**2, 3)))
        num_copies.append(int(is_copy.sum()))
    # The first image always has one, the second one if text follows it in its turn.
    assert min(num_copies) >= 1 and max(num_copies) == 2


def test_likelihoods_are_sums_over_parts_and_sources_have_none():
    model = tiny_decode_model.model(context_sigma=0.0)
    results = model.generate(PROMPTS, **OPTIONS)
    for prompt, row, total in zip(PROMPTS, results, results.total):
        nats = model.log_likelihood([[*as_list(prompt), *row]])[0]
        parts = [*as_list(prompt), *row]
        assert all(n == 0 for n, part in zip(nats, parts) if part.is_context)
        expected = [part.log_likelihood for part in row]
        np.testing.assert_allclose(nats[-len(row) :], expected, rtol=1e-4, atol=1e-4)
        assert total == pytest.approx(sum(expected) + sum(p.delimiters for p in row), abs=1e-3)


def test_an_image_that_ends_its_conversation_is_not_read_again(monkeypatch):
    model = tiny_decode_model.model(context_sigma=0.0)
    calls, plain = [], decode_loop.prefill
    monkeypatch.setattr(
        decode_loop, "prefill", lambda *args, **named: calls.append(1) or plain(*args, **named)
    )
    first = model.generate(["draw", "a"], images=1, max_tokens=0)
    assert len(calls) == 1 and np.asarray(first.session.state.needs_copy).all()
    model.generate(["draw", "a"], images=3, max_tokens=0)
    assert len(calls) == 4
    # The next turn reads it in the same pass as the prompt; an image at once reads it before.
    model.generate(["more", "b"], continue_from=first, images=0, max_tokens=3)
    assert len(calls) == 5
    again = model.generate([[], []], continue_from=first, images=1, max_tokens=0)
    assert len(calls) == 6 and [part.kind for part in again[0]] == ["image"]


def test_images_keep_their_noise_and_denoised_ones_are_read_again():
    model = tiny_decode_model.model(context_sigma=0.0)
    noisy = tiny_decode_model.model()
    options = {"images": 1, "max_tokens": 0, "seed": 5}
    part, old = (m.generate(["draw"], **options)[0][0] for m in (model, noisy))
    np.testing.assert_array_equal(part.latent, old.latent)
    assert part.log_likelihood == old.log_likelihood and old.clean_latent is None
    assert 1e-4 < np.abs(part.clean_latent - part.latent).max() < 1
    little = dataclasses.replace(
        model, cfg={**model.cfg, "noise": {**model.cfg["noise"], "context_sigma": 0.05}}
    ).generate(["draw"], **options)[0][0]
    noise = little.clean_latent - part.clean_latent
    np.testing.assert_array_equal(little.latent, part.latent)
    assert 0.02 < noise.std() < 0.1


def test_the_layout_reads_images_with_loss_again():
    part = chat_layout.MessagePart
    edit, answer = part("assistant", 1, True), part("assistant", "ok", True)
    start = [part("user", 0), part("user", "go"), edit]
    copy = part("assistant", 1, True, True)
    later_copy = part("user", 1, False, True)
    for parts, expected, image in (
        (start, start, edit),
        ([*start, answer], [*start, copy, answer], None),
        ([*start, part("user", "and")], [*start, later_copy, part("user", "and")], None),
        ([*start, part("assistant", "")], [*start, part("assistant", "")], edit),
        ([*start, edit], [*start, copy, edit], edit),
    ):
        assert chat_layout.insert_copies(parts) == (expected, image)
    items = chat_layout.apply_chat_template([*start, copy, answer], TOKENIZER, SIDE**2)
    first = np.flatnonzero(items.patch_index == 0)
    assert chat_layout.image_slots(items).tolist() == [0, 1, 1]
    assert items.is_copy[first].tolist() == [False, False, True]
    # The choice to go on is a target, the patches of the copy are none.
    assert items.is_target[first - 1].tolist() == [False, True, True]
    assert (
        not items.is_target[items.is_copy].any() and (items.part_index[items.is_copy] == -1).all()
    )
    assert items.part_index.max() == 3
