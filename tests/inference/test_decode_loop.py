"""The interleaved loop equals the parallel forward, single rows, and one long run; it is exact."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.parallel_forward import build_inputs, heads, parallel
from helpers.pretzel_batch import OWN_KEYS
from helpers.tiny_decode_model import CHANNELS, SIDE, TOKENIZER, VOCAB, image_part

from starflow2_jax.inference import decode_loop, sampling, session
from starflow2_jax.inference.inverse import Jacobi
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents import codec

MIXED = [
    "hello",
    [image_part(1), "what is it?"],
    [image_part(2), image_part(3), "ab"],
    [{"role": "system", "content": "be good"}, "x", Part("text", "assistant", "thin")],
    "a",
    [image_part(4)],
    [Part("text", "user", "a longer text of the user."), Part("text", "assistant", "b"),
     Part("text", "user", "c")],
    ["z", image_part(5, "assistant")],
]  # fmt: skip
DRAW = {"max_tokens": 10, "max_images": 2, "temperature": 1.0, "guidance": 1.5, "seed": 3}


def assert_same(actual, expected, tolerance=1e-10):
    """Assert that rows of parts have the same tokens and nearly the same latents and nats."""
    assert len(actual) == len(expected)
    for row, expected_row in zip(actual, expected):
        assert [(p.kind, p.tokens) for p in row] == [(p.kind, p.tokens) for p in expected_row]
        for a, b in zip(row, expected_row):
            for name in ("log_likelihood", "sampling_log_likelihood", "delimiters"):
                # An answer that ends at once has no sampled items.
                nats, expected_nats = getattr(a, name) or 0, getattr(b, name) or 0
                assert abs(nats - expected_nats) < 100 * tolerance
            if a.kind == "image":
                np.testing.assert_allclose(a.latent, b.latent, atol=tolerance, rtol=tolerance)


# --------------------------------------------------------------------------- the parallel forward


@pytest.mark.fast
@pytest.mark.parametrize("frequencies", ["released", "grid"])
@pytest.mark.parametrize("keys", ["next", "own"])
def test_cached_steps_equal_the_parallel_forward(frequencies, keys):
    """Check rows of several lengths with three images each, also in the branches of guidance.

    At most steps some rows read text and others patches.
    """
    flow_options = {"rope_frequencies": frequencies, "key_positions": keys}
    model = tiny_decode_model.model(flow=flow_options)
    cfg, params = model.model_config, model.params
    a, b = "user", "assistant"
    row = [image_part(1, a), Part("text", a, "make"), image_part(2, b), Part("text", b, "hm"),
           image_part(3, b), Part("text", b, "done")]  # fmt: skip
    other = [Part("text", a, "draw three"), image_part(4, b), image_part(5, b), image_part(6, b)]
    rows = [(row, "none"), (other, "none"), (row, "text"), (other, "all")]
    inputs, is_real = build_inputs(model, rows)
    assert (inputs.is_image[:2].sum(1) == 12).all() and len({r.sum() for r in is_real}) > 2

    expected = parallel(model, inputs, is_real)
    decode_params = decode_loop.prepare_params(params)
    shape = (4, inputs.ids.shape[1])
    state = decode_loop.empty_state(decode_params, cfg, *shape, has_null_branch=False)
    caches, valid = state.caches, state.valid
    select = lambda i, n: jax.tree.map(lambda leaf: leaf[:, i : i + n], (inputs, is_real))
    caches, valid = decode_loop.prefill(decode_params, caches, valid, *select(0, 5), cfg=cfg)

    @jax.jit
    def step(params, caches, valid, item):
        y, h, caches, valid = decode_loop.forward_cached(params, caches, valid, *item, cfg)
        return heads(params, y, h, cfg), caches, valid

    for t in range(5, inputs.ids.shape[1]):
        outputs, caches, valid = step(decode_params, caches, valid, select(t, 1))
        for output, reference in zip(outputs, expected):
            rows_at_t = is_real[:, t]
            close = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
            close(np.asarray(output)[rows_at_t, 0], reference[rows_at_t, t])
    assert all(reference.std() > 0.05 for reference in expected)


# ------------------------------------------------------------------------------ batches, long runs


@pytest.mark.parametrize("context_sigma", (pytest.param(None, marks=pytest.mark.slow), 0.0))
def test_a_batch_of_eight_is_eight_single_runs(x64, context_sigma):
    model = tiny_decode_model.model(context_sigma=context_sigma)
    batch = model.generate(MIXED, **DRAW)
    kinds = [[part.kind for part in row] for row in batch]
    assert {"image", "text"} == {kind for row in kinds for kind in row}
    assert len({len(row) for row in kinds}) > 1
    for i, prompt in enumerate(MIXED):
        single = model.generate([prompt], **DRAW, samples=(i,))
        assert_same(single, [batch[i]])
        assert single.finish == [batch.finish[i]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"flow": OWN_KEYS}, marks=pytest.mark.slow),
        pytest.param({"context_sigma": 0.0}, marks=pytest.mark.slow),
        {"flow": OWN_KEYS, "context_sigma": 0.05},
    ],
    ids=["next", "own", "clean", "own_clean"],
)
def test_a_continued_cache_is_one_long_run_also_after_a_stop_text(options, x64):
    model = tiny_decode_model.model(**options)
    prompts = MIXED[:3]
    plain = model.generate(prompts, **DRAW)
    texts = [part.text for row in plain for part in row if part.kind == "text"]
    stop = (texts[0][2:4], texts[-1][1:2])
    first = model.generate(prompts, **DRAW, stop=stop)
    assert "stop" in first.finish
    for row, full in zip(first, plain):
        for part, other in zip(row, full):
            assert not any(s in part.text for s in stop) and other.text.startswith(part.text)
    next_prompts = ["go on", [image_part(7), "and this?"], "draw"]
    second = model.generate(next_prompts, continue_from=first, **DRAW)
    third = model.generate(["so?"] * 3, continue_from=second, **DRAW)

    history = [[*as_list(p), *row] for p, row in zip(prompts, first)]
    history = [[*h, *as_list(p)] for h, p in zip(history, next_prompts)]
    fresh = model.generate(history, **DRAW)
    assert_same(second, fresh)
    long_history = [[*h, *row, "so?"] for h, row in zip(history, fresh)]
    assert_same(third, model.generate(long_history, **DRAW))
    # A row selected from the batch continues alike, and the results can be used twice.
    single = model.generate([next_prompts[1]], continue_from=first.select_rows([1]), **DRAW)
    assert_same(single, [second[1]])
    assert_same(model.generate(next_prompts, continue_from=first, **DRAW), second)


def test_continuing_without_new_parts_equals_a_longer_run(x64):
    model = tiny_decode_model.model()
    options = {**DRAW, "images": 0, "max_images": 0}
    full = model.generate(["hello", "ab"], **{**options, "max_tokens": 9})
    first = model.generate(["hello", "ab"], **{**options, "max_tokens": 4})
    rest = model.generate([[], []], continue_from=first, **{**options, "max_tokens": 5})
    for a, b, c, finish in zip(first, rest, full, first.finish):
        assert a[0].tokens + (b[0].tokens if b else ()) == c[0].tokens
        assert bool(b) == (finish == "length")


# --------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("context_sigma", (pytest.param(None, marks=pytest.mark.slow), 0.0))
def test_a_continued_conversation_is_teacher_forced(context_sigma):
    """Check the reported likelihoods in float32, after rows that a stop text truncated."""
    model = tiny_decode_model.model(context_sigma=context_sigma)
    prompts = MIXED[:6]
    first = model.generate(prompts, **DRAW)
    text_to_stop = next(part.text for row in first for part in row if len(part.text) > 2)
    stopped = model.generate(prompts, **DRAW, stop=(text_to_stop[1:3],))
    assert "stop" in stopped.finish
    next_prompts = [[image_part(7), "and this?"], *["go on"] * 5]
    results = model.generate(
        next_prompts, continue_from=stopped, **{**DRAW, "images": 1, "image_start": True}
    )
    history = [
        [*before, *as_list(p)] for before, p in zip(with_prompts(prompts, stopped), next_prompts)
    ]
    image, text = likelihood_errors(model, history, results)
    assert image < 1e-5 and text < 1e-4


def as_list(prompt):
    return prompt if isinstance(prompt, list) else [prompt]


def with_prompts(prompts, rows):
    return [[*as_list(p), *row] for p, row in zip(prompts, rows)]


def likelihood_errors(model, prompts, rows):
    """Return the largest differences to teacher-forced nats, per image dim and per text token."""
    scored = model.log_likelihood(with_prompts(prompts, rows))
    differences = {"image": [0.0], "text": [0.0]}
    for row, nats in zip(rows, scored):
        for part, expected in zip(row, nats[len(nats) - len(row) :]):
            size = SIDE**2 * CHANNELS if part.kind == "image" else len(part.tokens)
            differences[part.kind].append(abs(part.log_likelihood - expected) / max(size, 1))
    assert all(len(values) > 2 for values in differences.values())
    return max(differences["image"]), max(differences["text"])


def test_reported_likelihoods_are_the_teacher_forced_ones():
    model = tiny_decode_model.model()
    results = model.generate(MIXED, **DRAW)
    image, text = likelihood_errors(model, MIXED, results)
    assert image < 1e-5 and text < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"flow": OWN_KEYS}, marks=pytest.mark.slow),
        pytest.param({"context_sigma": 0.0}, marks=pytest.mark.slow),
        {"flow": OWN_KEYS, "context_sigma": 0.05},
    ],
    ids=["next", "own", "clean", "own_clean"],
)
def test_reported_likelihoods_are_exact_in_float64(options, x64):
    model = tiny_decode_model.model(**options)
    results = model.generate(MIXED[:4], **DRAW)
    image, text = likelihood_errors(model, MIXED[:4], results)
    assert image < 1e-10 and text < 1e-10
    # The sampling density differs under guidance, and is the plain one without.
    parts = [part for row in results for part in row if part.kind == "image"]
    assert all(abs(p.log_likelihood - p.sampling_log_likelihood) > 1e-3 for p in parts)
    plain = model.generate(MIXED[:2], **{**DRAW, "guidance": 0.0})
    for part in (part for row in plain for part in row if part.kind == "image"):
        assert part.log_likelihood == pytest.approx(part.sampling_log_likelihood, abs=1e-10)
        assert part.unconditional_log_likelihood is None


# ---------------------------------------------------------------------------------------- guidance


def test_other_sampling_parameters_need_no_other_program(x64):
    model = tiny_decode_model.model()
    options = {**DRAW, "images": 1, "image_start": True, "max_tokens": 4}
    run = lambda **changes: model.generate(MIXED[:2], **{**options, **changes})
    guided = run(guidance=2.0)
    programs = decode_loop.decode_chunk._cache_size()
    strong = run(guidance=3.0, temperature=0.7, top_p=0.9, top_k=5, image_temperature=0.8, seed=4)
    run(max_tokens=7, stop=("never said",))
    assert decode_loop.decode_chunk._cache_size() == programs
    assert np.abs(strong[0][0].latent - guided[0][0].latent).max() > 1e-3
    # Weight 0 in a session with the null branch equals a session without that branch.
    guided_start = model.generate(["a", "b"], **{**options, "guidance": 1.0})
    weightless = model.generate(
        ["c", "d"], continue_from=guided_start, **{**options, "guidance": 0.0}
    )
    history = [[p, *row, q] for p, row, q in zip("ab", guided_start, "cd")]
    assert_same(weightless, model.generate(history, **{**options, "guidance": 0.0}))


def test_the_null_branch_has_the_images_but_not_the_words_of_the_user():
    parts = [Part("text", "system", "s"), image_part(1), Part("text", "user", "what"),
             Part("text", "assistant", "yes"), Part("text", "user", "b")]  # fmt: skip
    layouts_by_null = {}
    for null in ("", "text", "all"):
        items = session.layout_parts(parts, TOKENIZER, 4, null, "")
        layouts_by_null[null] = (
            TOKENIZER.decode(items.ids),
            int((items.patch_index >= 0).sum()),
        )
    assert (
        "what" in layouts_by_null[""][0]
        and layouts_by_null[""][1] == layouts_by_null["text"][1] == 4
        and layouts_by_null["all"][1] == 0
    )
    for null in ("text", "all"):
        text = layouts_by_null[null][0]
        assert "what" not in text and "yes" in text and text.startswith("system\ns")


# ------------------------------------------------------------------------------ no repeated work


def test_nothing_is_read_twice(monkeypatch):
    """Check that the cache has one slot per item, and that sampled images are never encoded."""
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
    num_sampled = 3 * (SIDE**2 + 2) + sum(len(p.tokens) for p in first[0])
    padded = -(-(len(prompt.ids) - 1) // session.LENGTH_STEP) * session.LENGTH_STEP
    num_read = first.session.cache_length
    ended = first.finish == ["end"]
    assert padded + num_sampled + ended == num_read and calls == {
        "encode": 0,
        "prefill": 1,
        "decode_chunk": 1,
    }
    assert int(first.session.state.valid.sum()) == len(prompt.ids) - 1 + num_sampled + ended
    second = model.generate(["and?"], continue_from=first, **options, images=0)
    num_new = second.session.cache_length - num_read - sum(len(p.tokens) for p in second[0])
    # The new turn's items and the end of the turn before it, padded.
    turn = session.layout_parts([Part("text", "user", "and?")], TOKENIZER, 4, "", "")
    limit = -(-(len(turn.ids) + 2) // session.LENGTH_STEP) * session.LENGTH_STEP
    assert num_new <= limit + 1 and calls == {"encode": 0, "prefill": 2, "decode_chunk": 2}


# ----------------------------------------------------------------------------------- sampled items


def test_fixed_free_and_forced_images():
    model = tiny_decode_model.model()
    kinds = lambda results: [[part.kind for part in row] for row in results]
    images_only = model.generate(["a", "b"], images=2, max_tokens=0)
    assert kinds(images_only) == [["image", "image"]] * 2 and images_only.finish == ["end"] * 2
    text_only = model.generate(["a", "b"], images=0, max_tokens=5, temperature=1.0)
    assert all(set(row) == {"text"} for row in kinds(text_only))
    required = model.generate(["a", "b"], images=2, max_tokens=5, temperature=1.0)
    assert [row.count("image") for row in kinds(required)] == [2, 2]
    image_first = model.generate(["a", "b"], image_start=True, max_images=3, max_tokens=5)
    assert all(row[0] == "image" and row.count("image") <= 3 for row in kinds(image_first))
    # A forced image has no delimiter cost; a chosen one has.
    assert images_only[0][0].delimiters == 0.0
    chosen = model.generate(["hello"] * 8, **DRAW)
    opened = [p for row in chosen for p in row if p.kind == "image"]
    assert opened and all(p.delimiters < 0 for p in opened)
    slow = model.generate(["a"], images=1, max_tokens=0)[0][0].latent
    for jacobi in (Jacobi(4, 0.0, 4), Jacobi(4, tolerance=0.0)):
        fast = model.generate(["a"], images=1, max_tokens=0, jacobi=jacobi)[0][0].latent
        np.testing.assert_allclose(fast, slow, atol=1e-5)


@pytest.mark.fast
def test_every_item_has_a_key_of_its_own():
    """Check that the first patch of a part does not share the key of the token before it."""
    model = tiny_decode_model.model()
    keys = jax.random.split(jax.random.key(0), 1)
    state = session.new_session(model, keys, "", 64, True).state
    key_data = set()
    for part in range(3):
        for number in range(model.model_config.num_patches):
            item_state = state.replace(
                part_index=jnp.array([part]), index_in_part=jnp.array([number])
            )
            item_state = item_state.replace(patch=jnp.array([number]))
            kinds = (True, False) if number == 0 else (True,)
            for is_patch in kinds:
                key = decode_loop.item_keys(keys, item_state, jnp.array([is_patch]))
                key_data.add(np.asarray(jax.random.key_data(key)).tobytes())
    assert len(key_data) == 3 * (model.model_config.num_patches + 1)


@pytest.mark.fast
def test_tokens_are_sampled_from_the_top_k_and_the_top_p():
    logits = jnp.log(jnp.asarray([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.1, 0.1, 0.1, 0.6]]))
    is_kept = lambda k, p: np.isfinite(np.asarray(sampling.truncate_logits(logits, k, p)))
    assert is_kept(0, 1.0).all()
    np.testing.assert_array_equal(is_kept(2, 1.0)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(is_kept(0, 0.6)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(is_kept(0, 0.6)[1], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(is_kept(3, 0.65)[0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(is_kept(0, 1e-6)[0], [1, 0, 0, 0, 0])
    model = tiny_decode_model.model()
    greedy = model.generate(["hello"] * 2, images=0, max_tokens=6)
    assert greedy[0][0].tokens == greedy[1][0].tokens
    assert greedy[0][0].sampling_log_likelihood == 0.0
    top_1 = model.generate(["hello"] * 2, images=0, max_tokens=6, temperature=2.0, top_k=1, seed=9)
    assert top_1[0][0].tokens == greedy[0][0].tokens
    sampled = model.generate(["hello"] * 2, images=0, max_tokens=6, temperature=2.0)
    assert sampled[0][0].tokens != sampled[1][0].tokens
    # Greedy tokens are the most likely allowed tokens of the teacher-forced row.
    tokens = greedy[0][0].tokens
    row = [Part("text", "user", "hello"), greedy[0][0]]
    inputs, is_real = build_inputs(model, [(row, "none")])
    prompt = session.layout_parts([Part("text", "user", "hello")], TOKENIZER, 4, "", "")
    first = len(prompt.ids)
    np.testing.assert_array_equal(inputs.ids[0, first:], tokens)
    logits = np.array(parallel(model, inputs, is_real)[2][0, first - 1 : -1])
    ids = model.special_tokens
    logits[:, [*ids.banned, ids.vision_start, *range(ids.vocab_size, VOCAB)]] = -np.inf
    assert len(tokens) and tuple(logits.argmax(-1)) == tokens


def test_best_of_keeps_the_likeliest():
    model = tiny_decode_model.model()
    options = {"images": 1, "max_tokens": 0, "guidance": 1.0, "seed": 5}
    samples = model.generate(["a", "bc"], **options, n=4)
    best = model.generate(["a", "bc"], **options, best_of=4)
    for i in range(2):
        group = samples.rows[4 * i : 4 * i + 4]
        nats = [row[0].log_likelihood for row in group]
        assert best[i][0].log_likelihood == pytest.approx(max(nats), rel=1e-5)
    gain = model.generate(["a", "bc"], **options, best_of=4, best_of_gain=True)
    for i in range(2):
        gains = [row[0].log_likelihood - row[0].unconditional_log_likelihood
                 for row in samples.rows[4 * i : 4 * i + 4]]  # fmt: skip
        part = gain[i][0]
        part_gain = part.log_likelihood - part.unconditional_log_likelihood
        assert part_gain == pytest.approx(max(gains), abs=1e-4)
    assert len(model.generate(["go on"] * 2, continue_from=best, max_tokens=3)) == 2


def test_a_truncated_answer_is_marked():
    model = tiny_decode_model.model()
    results = model.generate(["hello"], images=0, max_tokens=3, stop=("never said",))
    assert results.finish == ["length"] and results[0][-1].truncated
    assert len(results[0][0].tokens) == 3
    ended = dataclasses.replace(model, params=ends_at_once(model))
    results = ended.generate(["hello"], images=0, max_tokens=3, stop=("never said",))
    assert results.finish == ["end"] and not results[0][-1].truncated and results[0][-1].text == ""


def ends_at_once(model):
    """Return parameters whose most likely token is always the end of the turn."""
    vlm = dict(model.params["vlm"])
    head = np.array(vlm["head"]["weight"])
    norm = {"weight": np.zeros_like(vlm["final_norm"]["weight"])}
    head[:] = 0
    skip = {**model.params["skip"], "deep": {"weight": model.params["skip"]["deep"]["weight"] * 0}}
    vlm |= {"head": {"weight": head}, "final_norm": norm}
    # All logits are 0: greedy takes the first allowed id, the tokenizer's pad, which ends a turn.
    return {**model.params, "vlm": vlm, "skip": skip}
