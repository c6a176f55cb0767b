"""The interleaved loop: equal to the parallel forward, to single rows, to one long run; exact."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.tiny_decode_model import CHANNELS, SIDE, TOKENIZER, VOCAB, picture

from starflow2_jax.data import chat_layout as layouts
from starflow2_jax.inference import decode_loop, sampling, session
from starflow2_jax.inference.image_latents import shallow_forward
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents import codec
from starflow2_jax.models import starflow2 as pretzel
from starflow2_jax.models.attention import segment_mask
from starflow2_jax.models.backbone import BackboneInputs

MIXED = [
    "hello",
    [picture(1), "what is it?"],
    [picture(2), picture(3), "ab"],
    [{"role": "system", "content": "be good"}, "x", Part("text", "assistant", "thin")],
    "a",
    [picture(4)],
    [Part("text", "user", "a longer text of the user."), Part("text", "assistant", "b"),
     Part("text", "user", "c")],
    ["z", picture(5, "assistant")],
]  # fmt: skip
DRAW = {"max_tokens": 10, "max_images": 2, "temperature": 1.0, "guidance": 1.5, "seed": 3}


def same(ours, others, tolerance=1e-10):
    """Rows of parts, equal in their tokens and, to a tolerance, in their latents and nats."""
    assert len(ours) == len(others)
    for row, other in zip(ours, others):
        assert [(p.kind, p.tokens) for p in row] == [(p.kind, p.tokens) for p in other]
        for a, b in zip(row, other):
            for name in ("log_likelihood", "sampling_log_likelihood", "delimiters"):
                assert abs(getattr(a, name) - getattr(b, name)) < 100 * tolerance
            if a.kind == "image":
                np.testing.assert_allclose(a.latent, b.latent, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------- the parallel forward


def laid_out(model, rows):
    """`Items` of the rows padded on the right, with u of their images."""
    items = [
        session.layout_parts(row, TOKENIZER, model.model_config.patches, null, "")
        for row, null in rows
    ]
    of = lambda row: [p.latent for p in row if p.kind == "image"]
    blank = np.zeros((1, SIDE**2, CHANNELS), np.float32)
    u = [
        shallow_forward(model.params, np.array(of(row), np.float32), model.model_config)[0]
        if of(row)
        else blank
        for row, _ in rows
    ]
    made = [
        {
            "ids": each.ids,
            "u": np.where(
                (each.patch_index >= 0)[:, None],
                images[np.maximum(each.image_index, 0), np.maximum(each.patch_index, 0)],
                0,
            ),
            "is_image": each.patch_index >= 0,
            "vlm_positions": layouts.vlm_positions(each, SIDE),
            "next_flow_positions": layouts.flow_positions(each, SIDE),
        }
        for each, images in zip(items, u)
    ]
    length = max(len(row["ids"]) for row in made)

    def stacked(name):
        pad = [(0, 0)] * (made[0][name].ndim - 1)
        grown = [np.pad(r[name], [(0, length - len(r[name])), *pad]) for r in made]
        return jnp.asarray(np.stack(grown))

    real = np.stack([np.arange(length) < len(row["ids"]) for row in made])
    fields = {name: stacked(name) for name in made[0]}
    return decode_loop.DecodeInputs(is_real=jnp.asarray(real), **fields), real


def heads(params, y, h, cfg):
    scale, mean = pretzel.image_head(params, h, cfg)
    logits = pretzel.text_logits(params, pretzel.text_states(params, y, h, cfg), cfg)
    return scale, mean, logits


def parallel(model, items):
    """`heads` at every position of the rows, read at once."""
    cfg = model.model_config

    @jax.jit
    def whole(params):
        inputs = BackboneInputs(
            ids=items.ids,
            latents=items.u,
            adapter_input=items.u,
            is_image=items.is_image,
            positions=items.vlm_positions,
            next_positions=items.next_flow_positions,
            mask=segment_mask(jnp.asarray(items.is_real, jnp.int32)),
        )
        states = pretzel.forward(params, inputs, cfg)
        return heads(params, states.vlm_states, states.flow_states, cfg)

    return [np.asarray(each) for each in whole(model.params)]


def test_cached_steps_equal_the_parallel_forward():
    """Rows with three images, of other lengths, so that at most steps some read text and others
    patches; the conditional ones and those of guidance."""
    model = tiny_decode_model.model()
    cfg, params = model.model_config, model.params
    a, b = "user", "assistant"
    row = [picture(1, a), Part("text", a, "make"), picture(2, b), Part("text", b, "hm"),
           picture(3, b), Part("text", b, "done")]  # fmt: skip
    other = [Part("text", a, "draw three"), picture(4, b), picture(5, b), picture(6, b)]
    rows = [(row, "none"), (other, "none"), (row, "text"), (other, "all")]
    items, real = laid_out(model, rows)
    assert (items.is_image[:2].sum(1) == 12).all() and len({r.sum() for r in real}) > 2

    expected = parallel(model, items)
    prepared = decode_loop.prepare_params(params)
    shape = (4, items.ids.shape[1])
    state = decode_loop.empty_state(prepared, cfg, *shape, has_null_branch=False)
    caches, valid = state.caches, state.valid
    cut = lambda i, n: jax.tree.map(lambda leaf: leaf[:, i : i + n], items)
    caches, valid = decode_loop.prefill(prepared, caches, valid, cut(0, 5), cfg=cfg)

    @jax.jit
    def step(params, caches, valid, item):
        y, h, caches, valid = decode_loop.forward_cached(params, caches, valid, item, cfg)
        return heads(params, y, h, cfg), caches, valid

    for t in range(5, items.ids.shape[1]):
        found, caches, valid = step(prepared, caches, valid, cut(t, 1))
        for ours, theirs in zip(found, expected):
            there = real[:, t]
            close = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
            close(np.asarray(ours)[there, 0], theirs[there, t])
    assert all(each.std() > 0.05 for each in expected)


# ------------------------------------------------------------------------------ batches, long runs


def test_a_batch_of_eight_is_eight_single_runs(x64):
    model = tiny_decode_model.model()
    whole = model.generate(MIXED, **DRAW)
    kinds = [[part.kind for part in row] for row in whole]
    assert {"image", "text"} == {kind for row in kinds for kind in row}
    assert len({len(row) for row in kinds}) > 1
    for i, prompt in enumerate(MIXED):
        alone = model.generate([prompt], **DRAW, samples=(i,))
        same(alone, [whole[i]])
        assert alone.finish == [whole.finish[i]]


def test_a_continued_cache_is_one_long_run_also_after_a_stop_text(x64):
    model = tiny_decode_model.model()
    prompts = MIXED[:3]
    plain = model.generate(prompts, **DRAW)
    said = [part.text for row in plain for part in row if part.kind == "text"]
    stop = (said[0][2:4], said[-1][1:2])
    first = model.generate(prompts, **DRAW, stop=stop)
    assert "stop" in first.finish
    for row, full in zip(first, plain):
        for part, other in zip(row, full):
            assert not any(s in part.text for s in stop) and other.text.startswith(part.text)
    more = ["go on", [picture(7), "and this?"], "draw"]
    second = model.generate(more, continue_from=first, **DRAW)
    third = model.generate(["so?"] * 3, continue_from=second, **DRAW)

    as_list = lambda prompt: prompt if isinstance(prompt, list) else [prompt]
    history = [[*as_list(p), *row] for p, row in zip(prompts, first)]
    history = [[*h, *as_list(p)] for h, p in zip(history, more)]
    fresh = model.generate(history, **DRAW)
    same(second, fresh)
    longer = [[*h, *row, "so?"] for h, row in zip(history, fresh)]
    same(third, model.generate(longer, **DRAW))
    # A row alone, out of the batch, goes on the same; and the results can be used twice.
    alone = model.generate([more[1]], continue_from=first.select_rows([1]), **DRAW)
    same(alone, [second[1]])
    same(model.generate(more, continue_from=first, **DRAW), second)


def test_going_on_without_new_parts_is_a_longer_run(x64):
    model = tiny_decode_model.model()
    options = {**DRAW, "images": 0, "max_images": 0}
    whole = model.generate(["hello", "ab"], **{**options, "max_tokens": 9})
    half = model.generate(["hello", "ab"], **{**options, "max_tokens": 4})
    rest = model.generate([[], []], continue_from=half, **{**options, "max_tokens": 5})
    for a, b, c, ended in zip(half, rest, whole, half.finish):
        assert a[0].tokens + (b[0].tokens if b else ()) == c[0].tokens
        assert bool(b) == (ended == "length")


# --------------------------------------------------------------------------------------- likelihood


def test_a_continued_conversation_is_teacher_forced():
    """In float32, after texts that were cut: what it says of its parts is what one pass says."""
    model = tiny_decode_model.model()
    prompts = MIXED[:6]
    first = model.generate(prompts, **DRAW)
    said = next(part.text for row in first for part in row if len(part.text) > 2)
    cut = model.generate(prompts, **DRAW, stop=(said[1:3],))
    assert "stop" in cut.finish
    more = [[picture(7), "and this?"], *["go on"] * 5]
    found = model.generate(more, continue_from=cut, **{**DRAW, "images": 1, "image_start": True})
    history = [[*before, *more_of(p)] for before, p in zip(with_prompts(prompts, cut), more)]
    image, text = errors(model, history, found)
    assert image < 1e-5 and text < 1e-4


def more_of(prompt):
    return prompt if isinstance(prompt, list) else [prompt]


def with_prompts(prompts, rows):
    return [[*more_of(p), *row] for p, row in zip(prompts, rows)]


def errors(model, prompts, rows):
    """Differences to the teacher-forced nats: (of images per dim, of texts per token)."""
    scored = model.log_likelihood(with_prompts(prompts, rows))
    of = {"image": [0.0], "text": [0.0]}
    for row, nats in zip(rows, scored):
        for part, expected in zip(row, nats[len(nats) - len(row) :]):
            size = SIDE**2 * CHANNELS if part.kind == "image" else len(part.tokens)
            of[part.kind].append(abs(part.log_likelihood - expected) / max(size, 1))
    assert all(len(found) > 2 for found in of.values())
    return max(of["image"]), max(of["text"])


def test_reported_likelihoods_are_the_teacher_forced_ones():
    model = tiny_decode_model.model()
    found = model.generate(MIXED, **DRAW)
    image, text = errors(model, MIXED, found)
    assert image < 1e-5 and text < 1e-4


def test_reported_likelihoods_are_exact_in_float64(x64):
    model = tiny_decode_model.model()
    found = model.generate(MIXED[:4], **DRAW)
    image, text = errors(model, MIXED[:4], found)
    assert image < 1e-10 and text < 1e-10
    # Those drawn from are others, under guidance; without guidance and temperature, the same.
    parts = [part for row in found for part in row if part.kind == "image"]
    assert all(abs(p.log_likelihood - p.sampling_log_likelihood) > 1e-3 for p in parts)
    plain = model.generate(MIXED[:2], **{**DRAW, "guidance": 0.0})
    for part in (part for row in plain for part in row if part.kind == "image"):
        assert part.log_likelihood == pytest.approx(part.sampling_log_likelihood, abs=1e-10)
        assert part.unconditional_log_likelihood is None


# ---------------------------------------------------------------------------------------- guidance


def test_no_guidance_and_other_numbers_need_no_other_program(x64):
    model = tiny_decode_model.model()
    options = {**DRAW, "images": 1, "image_start": True, "max_tokens": 4}
    run = lambda **changes: model.generate(MIXED[:2], **{**options, **changes})
    guided = run(guidance=2.0)
    programs = decode_loop.decode_chunk._cache_size()
    strong = run(guidance=3.0, temperature=0.7, top_p=0.9, top_k=5, image_temperature=0.8, seed=4)
    run(max_tokens=7, stop=("never said",))
    assert decode_loop.decode_chunk._cache_size() == programs
    assert np.abs(strong[0][0].latent - guided[0][0].latent).max() > 1e-3
    # A weight of nothing in a conversation that has the branch, and none at all.
    begun = model.generate(["a", "b"], **{**options, "guidance": 1.0})
    weightless = model.generate(["c", "d"], continue_from=begun, **{**options, "guidance": 0.0})
    history = [[p, *row, q] for p, row, q in zip("ab", begun, "cd")]
    same(weightless, model.generate(history, **{**options, "guidance": 0.0}))


def test_the_null_branch_has_the_images_but_not_the_words_of_the_user():
    given = [Part("text", "system", "s"), picture(1), Part("text", "user", "what"),
             Part("text", "assistant", "yes"), Part("text", "user", "b")]  # fmt: skip
    kept = {}
    for null in ("", "text", "all"):
        items = session.layout_parts(given, TOKENIZER, 4, null, "")
        kept[null] = (
            TOKENIZER.decode(items.ids),
            int((items.patch_index >= 0).sum()),
        )
    assert "what" in kept[""][0] and kept[""][1] == kept["text"][1] == 4 and kept["all"][1] == 0
    for null in ("text", "all"):
        words = kept[null][0]
        assert "what" not in words and "yes" in words and words.startswith("system\ns")


# --------------------------------------------------------------------------------- nothing twice


def test_nothing_is_read_twice(monkeypatch):
    """Slots of the cache: the prompt's, and one for each item that was drawn; no image is encoded
    or taken through the shallow flow on its way into the cache."""
    model = tiny_decode_model.model()
    calls = {"encode": 0, "prefill": 0, "decode_chunk": 0}
    for holder, name in (
        (codec, "encode"),
        (decode_loop, "prefill"),
        (decode_loop, "decode_chunk"),
    ):
        plain = getattr(holder, name)

        def counted(*args, plain=plain, name=name, **named):
            calls[name] += 1
            return plain(*args, **named)

        monkeypatch.setattr(holder, name, counted)
    options = {**DRAW, "guidance": 0.0, "temperature": 0.0, "max_tokens": 6}
    first = model.generate(["hello"], **options, images=3, image_start=True)
    prompt = session.layout_parts([Part("text", "user", "hello")], TOKENIZER, 4, "", "")
    drawn = 3 * (SIDE**2 + 2) + sum(len(p.tokens) for p in first[0])
    padded = -(-(len(prompt.ids) - 1) // session.LENGTH_STEP) * session.LENGTH_STEP
    read = first.session.cache_length
    ended = first.finish == ["end"]
    assert padded + drawn + ended == read and calls == {
        "encode": 0,
        "prefill": 1,
        "decode_chunk": 1,
    }
    assert int(first.session.state.valid.sum()) == len(prompt.ids) - 1 + drawn + ended
    second = model.generate(["and?"], continue_from=first, **options, images=0)
    new = second.session.cache_length - read - sum(len(p.tokens) for p in second[0])
    # The new turn's items and the end of the turn before, padded.
    turn = session.layout_parts([Part("text", "user", "and?")], TOKENIZER, 4, "", "")
    most = -(-(len(turn.ids) + 2) // session.LENGTH_STEP) * session.LENGTH_STEP
    assert new <= most + 1 and calls == {"encode": 0, "prefill": 2, "decode_chunk": 2}


# ------------------------------------------------------------------------------------ what is drawn


def test_fixed_free_and_forced_images():
    model = tiny_decode_model.model()
    kinds = lambda found: [[part.kind for part in row] for row in found]
    only = model.generate(["a", "b"], images=2, max_tokens=0)
    assert kinds(only) == [["image", "image"]] * 2 and only.finish == ["end"] * 2
    none = model.generate(["a", "b"], images=0, max_tokens=5, temperature=1.0)
    assert all(set(row) == {"text"} for row in kinds(none))
    due = model.generate(["a", "b"], images=2, max_tokens=5, temperature=1.0)
    assert [row.count("image") for row in kinds(due)] == [2, 2]
    begun = model.generate(["a", "b"], image_start=True, max_images=3, max_tokens=5)
    assert all(row[0] == "image" and row.count("image") <= 3 for row in kinds(begun))
    # An image that was forced costs nothing, one that was chosen does.
    assert only[0][0].delimiters == 0.0
    chosen = model.generate(["hello"] * 8, **DRAW)
    opened = [p for row in chosen for p in row if p.kind == "image"]
    assert opened and all(p.delimiters < 0 for p in opened)
    slow = model.generate(["a"], images=1, max_tokens=0)[0][0].latent
    fast = model.generate(["a"], images=1, max_tokens=0, jacobi=Jacobi(4, 0.0, 4))[0][0].latent
    np.testing.assert_allclose(fast, slow, atol=1e-5)


def test_every_item_has_a_key_of_its_own():
    """An image that begins its part does not draw its first patch from the key of the token."""
    model = tiny_decode_model.model()
    keys = jax.random.split(jax.random.key(0), 1)
    state = session.new_session(model.decode_params, model.model_config, keys, "", 64, True).state
    found = set()
    for part in range(3):
        for number in range(model.model_config.patches):
            now = state.replace(part_index=jnp.array([part]), index_in_part=jnp.array([number]))
            now = now.replace(patch=jnp.array([number]))
            kinds = (True, False) if number == 0 else (True,)
            for drawing in kinds:
                key = decode_loop.item_keys(keys, now, jnp.array([drawing]))
                found.add(np.asarray(jax.random.key_data(key)).tobytes())
    assert len(found) == 3 * (model.model_config.patches + 1)


def test_words_are_cut_as_asked():
    logits = jnp.log(jnp.asarray([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.1, 0.1, 0.1, 0.6]]))
    kept = lambda k, p: np.isfinite(np.asarray(sampling.truncate_logits(logits, k, p)))
    assert kept(0, 1.0).all()
    np.testing.assert_array_equal(kept(2, 1.0)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(kept(0, 0.6)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(kept(0, 0.6)[1], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(kept(3, 0.65)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(kept(0, 1e-6)[0], [1, 0, 0, 0, 0])
    model = tiny_decode_model.model()
    greedy = model.generate(["hello"] * 2, images=0, max_tokens=6)
    assert greedy[0][0].tokens == greedy[1][0].tokens
    assert greedy[0][0].sampling_log_likelihood == 0.0
    one = model.generate(["hello"] * 2, images=0, max_tokens=6, temperature=2.0, top_k=1, seed=9)
    assert one[0][0].tokens == greedy[0][0].tokens
    warm = model.generate(["hello"] * 2, images=0, max_tokens=6, temperature=2.0)
    assert warm[0][0].tokens != warm[1][0].tokens
    # The likeliest token of the teacher-forced row, of those that may be drawn.
    said = greedy[0][0].tokens
    items, _ = laid_out(model, [([Part("text", "user", "hello"), greedy[0][0]], "none")])
    prompt = session.layout_parts([Part("text", "user", "hello")], TOKENIZER, 4, "", "")
    first = len(prompt.ids)
    np.testing.assert_array_equal(items.ids[0, first:], said)
    logits = np.array(parallel(model, items)[2][0, first - 1 : -1])
    ids = session.special_tokens(model.tokenizer, model.model_config)
    logits[:, [*ids.banned, ids.vision_start, *range(ids.vocab_size, VOCAB)]] = -np.inf
    assert len(said) and tuple(logits.argmax(-1)) == said


def test_best_of_keeps_the_likeliest():
    model = tiny_decode_model.model()
    options = {"images": 1, "max_tokens": 0, "guidance": 1.0, "seed": 5}
    every = model.generate(["a", "bc"], **options, n=4)
    best = model.generate(["a", "bc"], **options, best_of=4)
    for i in range(2):
        group = every.rows[4 * i : 4 * i + 4]
        nats = [row[0].log_likelihood for row in group]
        assert best[i][0].log_likelihood == pytest.approx(max(nats), rel=1e-5)
    gain = model.generate(["a", "bc"], **options, best_of=4, best_of_gain=True)
    for i in range(2):
        gains = [row[0].log_likelihood - row[0].unconditional_log_likelihood
                 for row in every.rows[4 * i : 4 * i + 4]]  # fmt: skip
        part = gain[i][0]
        own = part.log_likelihood - part.unconditional_log_likelihood
        assert own == pytest.approx(max(gains), abs=1e-4)
    assert len(model.generate(["go on"] * 2, continue_from=best, max_tokens=3)) == 2


def test_what_is_cut_off_says_so():
    model = tiny_decode_model.model()
    found = model.generate(["hello"], images=0, max_tokens=3, stop=("never said",))
    assert found.finish == ["length"] and found[0][-1].truncated
    assert len(found[0][0].tokens) == 3
    ended = dataclasses.replace(model, params=ends_at_once(model))
    found = ended.generate(["hello"], images=0, max_tokens=3, stop=("never said",))
    assert found.finish == ["end"] and not found[0][-1].truncated and found[0][-1].text == ""


def ends_at_once(model):
    """Weights whose likeliest token is always the end of the turn."""
    vlm = dict(model.params["vlm"])
    head = np.array(vlm["head"]["weight"])
    norm = {"weight": np.zeros_like(vlm["final_norm"]["weight"])}
    head[:] = 0
    skip = {**model.params["skip"], "deep": {"weight": model.params["skip"]["deep"]["weight"] * 0}}
    vlm |= {"head": {"weight": head}, "final_norm": norm}
    # All logits are 0: greedy takes the first that is open, which is the tokenizer's pad, an end.
    return {**model.params, "vlm": vlm, "skip": skip}
