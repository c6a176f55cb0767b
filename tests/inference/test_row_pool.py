"""Rows of a pool begin and end independently, and sample what a batch or a single row samples."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.tiny_decode_model import image_part

from starflow2_jax.inference import decode_loop, row_caches
from starflow2_jax.inference.clean_copies import clean_image
from starflow2_jax.inference.image_latents import shallow_forward, shallow_inverse
from starflow2_jax.inference.part_builder import PartBuilder
from starflow2_jax.inference.prompts import parse_prompt
from starflow2_jax.inference.row_items import ImageValues, layout_conversation
from starflow2_jax.inference.row_pool import RowOptions, RowPool

PROMPTS = [
    "hello",
    [image_part(1), "what is it?"],
    [image_part(2), image_part(3), "ab"],
    [{"role": "system", "content": "be good"}, "x", {"role": "assistant", "content": "thin"}, "y"],
    "a longer text of the user than all others",
    [image_part(4, "assistant"), "z"],
]
DRAW = {"max_tokens": 10, "max_images": 2, "temperature": 1.0, "seed": 3}
# Other numbers for every row, which share the program and the batch.
VARIANTS = [
    {"guidance": 1.5},
    {"temperature": 0.0},
    {"guidance": 0.7, "image_temperature": 0.5, "temperature": 0.8},
    {"top_k": 3},
    {"top_p": 0.7, "seed": 5},
    {"guidance": 2.0, "seed": 8},
]


def lay_out(model, prompt, null=""):
    """Return the items of a prompt, and the number of its parts."""
    parts = parse_prompt(prompt, "prompt")
    latents = [part.latent for part in parts if part.kind == "image"]
    u = shallow_forward(model.params, np.asarray(latents), model.model_config)[0]
    images = [ImageValues(values, values) for values in u]
    return layout_conversation(model, parts, images, null), len(parts)


class Driver:
    """A pool whose rows are run to their ends."""

    def __init__(self, model, rows=8, slots=160):
        self.model, self.pool = model, RowPool(model, rows, slots)
        self.items, self.names, self.answers, self.reads = {}, {}, {}, {}

    def admit(self, name, prompt, cached=None, **options):
        model, options = self.model, {**DRAW, **options}
        seed, images = options.pop("seed"), options.pop("images", None)
        number = options.pop("number", 0)
        key = jax.random.fold_in(jax.random.key(seed), number)
        if images is not None:
            options |= {"max_images": images, "images_required": images}
        items, num_parts = lay_out(model, prompt)
        row, count = self.pool.read(items, cached)
        null = None
        if options.get("guidance"):
            null_items = lay_out(model, prompt, "text")[0]
            null = null_items, self.pool.read(null_items)[0]
        row_options = RowOptions(np.asarray(jax.random.key_data(key)), **options)
        r = self.pool.admit(items, row, row_options, num_parts, null)
        self.items[r], self.names[r], self.reads[name] = [], name, count

    def step(self, steps=16, until_row_ends=False):
        for r, items in self.pool.run_chunk(steps, until_row_ends=until_row_ends).items():
            self.items[r] += items
        for r in list(self.names):
            mode = self.pool.mode(r)
            if mode >= decode_loop.COPY_TEXT:
                self.items[r].append(self.pool.read_copy(r, self.copy_values(r)))
            elif mode >= decode_loop.ENDED:
                self.end(r)

    def copy_values(self, r):
        model, items = self.model, self.items[r]
        builder = PartBuilder(model)
        builder.add(items)
        _, first, u = builder.images[-1]
        view, start = self.pool.row_session(r)
        x = shallow_inverse(model.params, u[None], model.model_config)
        copy = clean_image(model, view, start, 0, items, first, x[0]).copy
        return shallow_forward(model.params, copy[None], model.model_config)[0][0]

    def end(self, r):
        builder = PartBuilder(self.model)
        builder.add(self.items[r])
        builder.end_text()
        name = self.names.pop(r)
        self.answers[name] = builder, self.pool.snapshot(r)
        self.pool.release(r)

    def run(self):
        while self.names:
            self.step()
        return self.answers


def assert_equals_generate(model, builder, prompt, options, tolerance):
    options = {**DRAW, **options}
    number = options.pop("number", 0)
    expected = model.generate([prompt], **options, samples=(number,))[0]
    assert [(p.kind, p.tokens) for p in builder.parts] == [(p.kind, p.tokens) for p in expected]
    for part, other in zip(builder.parts, expected):
        assert part.delimiters == pytest.approx(other.delimiters, abs=tolerance)
        if part.kind == "text":
            nats = part.log_likelihood or 0
            assert nats == pytest.approx(other.log_likelihood or 0, abs=tolerance)
    images = [part.latent for part in expected if part.kind == "image"]
    for image, latent in zip(builder.images, images):
        x = shallow_inverse(model.params, image.u[None], model.model_config)[0]
        np.testing.assert_allclose(x, latent, atol=tolerance)


@pytest.mark.parametrize("context_sigma", (None, 0.05))
def test_rows_of_a_pool_sample_what_generate_samples(x64, context_sigma):
    """Check rows with other options, which are admitted while others are being sampled."""
    model = tiny_decode_model.model(context_sigma=context_sigma)
    driver, requests = Driver(model), list(enumerate(zip(PROMPTS, VARIANTS)))
    for number, (prompt, options) in requests:
        while driver.pool.num_free < 2:
            driver.step(5)
        driver.admit(number, prompt, number=number, **options)
        driver.step(3)
    answers = driver.run()
    kinds = {part.kind for builder, _ in answers.values() for part in builder.parts}
    assert kinds == {"image", "text"}
    for number, (prompt, options) in requests:
        builder = answers[number][0]
        assert_equals_generate(model, builder, prompt, {**options, "number": number}, 1e-9)


def test_a_row_is_bit_for_bit_the_same_alone_and_among_others():
    """Check float32, whatever the neighbors, the row's number and the chunks are."""
    model = tiny_decode_model.model()
    request = {"images": 1, "guidance": 1.2, "number": 4}
    alone, crowded = Driver(model), Driver(model)
    alone.admit("x", PROMPTS[1], **request)
    for number, options in enumerate(VARIANTS[1:4]):
        crowded.admit(number, PROMPTS[number], **options)
        crowded.step(5 + number, until_row_ends=number == 1)
    crowded.admit("x", PROMPTS[1], **request)
    crowded.admit("y", PROMPTS[0])
    expected, actual = alone.run()["x"][0], crowded.run()["x"][0]
    assert [p.kind for p in actual.parts].count("image") == 1 and len(crowded.answers) == 5
    for part, other in zip(actual.parts, expected.parts):
        assert (part.kind, part.tokens) == (other.kind, other.tokens)
        assert part.log_likelihood == other.log_likelihood
    np.testing.assert_array_equal(actual.images[0].u, expected.images[0].u)
    np.testing.assert_array_equal(actual.total, expected.total)


def test_a_conversation_goes_on_from_what_was_read(x64):
    model = tiny_decode_model.model()
    driver = Driver(model)
    driver.admit("first", PROMPTS[1], images=1)
    builder, (read,) = driver.run()["first"]
    latent = shallow_inverse(model.params, builder.images[0].u[None], model.model_config)[0]
    answer = [
        dataclasses.replace(part, latent=latent) if part.kind == "image" else part
        for part in builder.parts
    ]
    history = [*PROMPTS[1], *answer, "and this?"]
    # In place of the inverse's forward pass, which differs by rounding.
    items, _ = lay_out(model, history)
    items.latents[items.is_image] = np.where(
        np.isclose(items.latents[items.is_image], read.content.latents[read.content.is_image]),
        read.content.latents[read.content.is_image],
        items.latents[items.is_image],
    )
    assert read.content.common_prefix(items.content) == len(read.content)
    shorter = items.content.first(len(read.content) - 2)
    assert read.content.common_prefix(shorter) == len(read.content) - 2
    driver.admit("plain", history, number=2)
    driver.admit("kept", history, cached=read, number=2)
    answers = driver.run()
    assert driver.reads["plain"] == 0 and driver.reads["kept"] > 20
    for name in ("plain", "kept"):
        assert_equals_generate(model, answers[name][0], history, {"number": 2}, 1e-9)


def test_a_pool_needs_one_program():
    model = tiny_decode_model.model()
    driver = Driver(model, rows=6)
    programs = []
    for number, (prompt, options) in enumerate(zip(PROMPTS, VARIANTS)):
        while driver.pool.num_free < 2:
            driver.step()
        driver.admit(number, prompt, **options)
        driver.step(2)
        programs.append(decode_loop.decode_chunk._cache_size())
    driver.run()
    assert decode_loop.decode_chunk._cache_size() == programs[0]


def test_a_chunk_ends_with_a_row_if_something_waits_for_it():
    driver = Driver(tiny_decode_model.model(), rows=6)
    for name, tokens in (("short", 2), ("long", 9)):
        driver.admit(name, "hello", temperature=0.0, max_tokens=tokens, max_images=0)
    sizes = [len(items) for items in driver.pool.run_chunk(16, until_row_ends=True).values()]
    assert sizes == [2, 2] and driver.pool.is_active
    sizes = [len(items) for items in driver.pool.run_chunk(16).values()]
    assert sizes == [0, 7]


@pytest.mark.fast
def test_the_pieces_of_a_prompt_fit_into_the_cache():
    smallest = row_caches.PREFILL_SIZES[-1]
    for count in range(1, 600):
        room, rest = count + smallest, count
        while rest > 0:
            size = row_caches.prefill_size(rest, room)
            assert size <= room and (size < 2 * rest or size == smallest)
            room, rest = room - size, rest - size
