"""The use of a STARFlow2: loading, prompts, the command, refusals, and denoised images."""

import contextlib
import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from helpers import tiny_decode_model
from helpers.pretzel_batch import OWN_KEYS
from helpers.starflow2_folders import PIXELS, save_run
from helpers.tiny_decode_model import image_part
from PIL import Image

from starflow2_jax import convert, generate as command
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.inference import (
    decode_loop,
    denoise,
    generate,
    load,
    output,
    scoring,
    session,
)
from starflow2_jax.inference.api import STARFlow2
from starflow2_jax.inference.image_latents import encode_images
from starflow2_jax.inference.options import GenerateOptions, make_options, sampling_defaults
from starflow2_jax.inference.prompts import Part
from starflow2_jax.latents import codec
from starflow2_jax.training import preprocess

# ---------------------------------------------------------------------------------------- a run


def test_a_run_and_its_folders_draw_the_same(parts, tmp_path):
    run = parts[1]
    model = load.load(run)
    assert isinstance(model, STARFlow2) and model.source == run
    options = {"images": 1, "max_tokens": 0, "guidance": 1.0}
    part = model.generate(["a red circle"], **options)[0][0]
    assert part.image.shape == (PIXELS, PIXELS, 3) and part.image.dtype == np.uint8
    for embed, name in ((True, "whole"), (False, "near")):
        load.export(run, str(tmp_path / name), embed=embed)
        other = load.load(str(tmp_path / name)).generate(["a red circle"], **options)[0][0]
        np.testing.assert_array_equal(other.image, part.image)
        assert (tmp_path / name / "fae").exists() == embed
    # The command writes the first kind, and a folder that was moved still has all it needs.
    for name, extra_args in (("exported", []), ("paths", ["--noembed"])):
        values = flags.FlagValues()
        convert.define(values)
        values(["convert", "--model", run, "--out", str(tmp_path / name), *extra_args])
        convert.main("export", [], values)
        assert (tmp_path / name / "vlm").exists() == (name == "exported")
    (tmp_path / "exported").rename(tmp_path / "moved")
    assert load.load(str(tmp_path / "moved")).codec.sha256 == model.codec.sha256


def test_a_long_answer_of_a_loaded_model_needs_one_program(parts, caplog):
    """Check that the output of a chunk of steps has the type of the first input."""
    model = load.load(parts[1])
    images = decode_loop.CHUNK // model.model_config.num_patches + 1
    options = {"images": images, "image_start": True, "max_tokens": 1}
    decode_loop.decode_chunk.clear_cache()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        row = model.generate([["a red circle"]], **options)[0]
    assert sum(part.kind == "image" for part in row) == images
    started = [entry.getMessage() for entry in caplog.records]
    assert sum(line.startswith("Compiling jit(decode_chunk) ") for line in started) == 1


def test_rows_continue_with_the_same_program_after_others_have_stopped(parts, caplog):
    model = load.load(parts[1])
    options = {"images": 0, "max_tokens": 40, "temperature": 1.0}
    prompts = [["a red circle"], ["a blue square"]]
    texts = [row[0].text if row else "" for row in model.generate(prompts, **options)]
    words = [word for word in texts[0].split()[:8] if len(word) > 1 and word not in texts[1]]
    decode_loop.decode_chunk.clear_cache()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        results = model.generate(prompts, stop=(words[0],), **options)
    assert results.finish[0] == "stop" and results[1][0].text == texts[1] and len(texts[1]) > 16
    started = [entry.getMessage() for entry in caplog.records]
    assert sum(line.startswith("Compiling jit(decode_chunk) ") for line in started) == 1


def test_a_run_says_how_much_noise_its_images_have(parts, monkeypatch):
    saved = open_model(parts[1])
    for changes, expected in (({"image_temperature": 0.5}, 0.5), ({}, 1.0)):
        sample = {k: v for k, v in saved.config["sample"].items() if k != "image_temperature"}
        old = dataclasses.replace(saved, config={**saved.config, "sample": {**sample, **changes}})
        monkeypatch.setattr(load, "open_model", lambda path, old=old: old)
        options = sampling_defaults(load.read_config(parts[1])["sample"])
        assert options["image_temperature"] == expected


def test_images_are_read_with_the_noise_of_their_row(parts):
    model = load.load(parts[1])
    pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
    rows = [[pixels, "what is it?"], ["what is it?", pixels]]
    scores = model.log_likelihood(rows)
    assert [len(row) for row in scores] == [2, 2] and np.isfinite(scores).all()
    assert model.log_likelihood(rows) == scores != model.log_likelihood(rows, seed=1)
    results = model.generate(rows, images=0, max_tokens=4)
    single = model.generate(rows[1:], images=0, max_tokens=4, samples=(1,))
    assert results[1][0].tokens == single[0][0].tokens
    # Editing: the source, an instruction, a picture; the source is the cache's, not read again.
    edited = model.generate([[pixels, "make it blue"]], images=1, image_start=True, max_tokens=3)
    assert edited[0][0].kind == "image"
    again = model.generate([["brighter"]], continue_from=edited, images=1, max_tokens=0)
    assert again[0][0].image.shape == (PIXELS, PIXELS, 3)


def test_images_of_the_user_are_read_clean(parts):
    model = load.load(parts[1])
    noise = {**model.cfg["noise"], "context_sigma": 0.0}
    clean_model = dataclasses.replace(model, cfg={**model.cfg, "noise": noise})
    pixels = np.random.default_rng(0).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
    target = Part("image", image=pixels)
    rows, keys = (
        [[Part("image", "user", image=pixels), target]],
        jax.random.split(jax.random.key(1), 1),
    )
    noisy = encode_images(model, rows, keys, [0])[0][0]
    (x,), (copies,) = encode_images(clean_model, rows, keys, [0])
    mean, log_variance = codec.encode(model.codec, pixels[None])
    part_keys = jax.vmap(jax.random.fold_in)(keys, jnp.zeros(1, jnp.int32))
    posterior = {"latent_mean": mean, "latent_logvar": log_variance}
    no_noise = {**model.cfg, "noise": {**noise, "kind": "none"}}
    np.testing.assert_array_equal(x[0], preprocess.tokens(posterior, part_keys, no_noise, False)[0])
    assert 0.05 < (noisy[0] - x[0]).std() < 0.2
    np.testing.assert_array_equal(x[1], noisy[1])
    assert 0.05 < (x[1] - copies[1]).std() < 0.2
    # They are conditions: the likelihood is that of the other parts.
    prompt = ["what is it?", pixels, Part("text", text="a"), target]
    (scores,) = clean_model.log_likelihood([prompt])
    assert scores[1] == 0 and np.all(np.asarray(scores)[[0, 2, 3]] < 0)
    assert model.log_likelihood([prompt])[0][1] < 0


def test_another_vlm_codec_or_task_is_refused(parts, tmp_path):
    root, run = parts
    folder_codec = codec.load(str(root / "fae"))
    args = (root, folder_codec)
    with pytest.raises(ValueError, match=r"trained with another VLM .*vlm: expected sha2"):
        load.load(save_run(tmp_path / "a", *args, vlm="0" * 64))
    with pytest.raises(ValueError, match=r"trained with another codec than .*fae: expected sha256"):
        load.load(save_run(tmp_path / "b", *args, fae="0" * 64))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load.load(run, vlm=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="task='fae_features', expected a flow or a STARFlow2"):
        load.load(str(root / "features"))


# ------------------------------------------------------------------------------------ the command


def run_command(capsys, *args):
    values = flags.FlagValues()
    command.define(values)
    values(["generate", *map(str, args)])
    command.main([], values)
    return capsys.readouterr().out


def test_the_command_draws_and_answers(parts, tmp_path, capsys):
    run, out = parts[1], tmp_path / "out"
    run_command(
        capsys, "--model", run, "--prompt", "a red circle", "--n", 2, "--guidance", 2, "--out", out
    )
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == ["00000_00_0.png", "00000_01_0.png"]
    sliding = ("--jacobi", 2, "--tolerance", 0, "--out", tmp_path / "sliding")
    run_command(capsys, "--model", run, "--prompt", "a red circle", "--n", 2, "--guidance", 2,
                *sliding)  # fmt: skip
    images = [np.asarray(Image.open(p / names[0]), int) for p in (out, tmp_path / "sliding")]
    assert np.abs(images[0] - images[1]).max() <= 1
    with pytest.raises(ValueError, match="--tolerance needs --jacobi"):
        run_command(capsys, "--model", run, "--prompt", "a", "--tolerance", 1e-3)
    note = json.loads(Image.open(out / names[1]).text[output.PNG_KEY])
    assert note["guidance"] == 2.0 and note["prompt"] == "a red circle" and note["model"] == run
    assert np.isfinite(note["log_likelihood"]) and note["row"] == "00000_01"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row[0]["image"] for row in lines] == [str(out / name) for name in names]
    with pytest.raises(ValueError, match="is not empty"):
        run_command(capsys, "--model", run, "--prompt", "a", "--out", out)
    # A chat with a picture by its path beside the file, a batch of two, text alone.
    chat = [{"role": "user", "content": [{"type": "image", "image": names[0]},
                                         {"type": "text", "text": "what is it?"}]}]  # fmt: skip
    (out / "chat.json").write_text(json.dumps(chat))
    args = ("--model", run, "--max_tokens", 3, "--json")
    rows = json.loads(run_command(capsys, *args, "--chat", out / "chat.json"))["rows"]
    assert len(rows) == 1 and rows[0][0]["type"] == "text"
    (out / "batch.jsonl").write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}\n")
    rows = json.loads(run_command(capsys, *args, "--batch", out / "batch.jsonl"))["rows"]
    assert len(rows) == 2
    printed = run_command(capsys, "--model", run, "--image", out / names[0], "--prompt", "why?",
                "--max_tokens", 3)  # fmt: skip
    assert "1 answers with 0 images" in printed


def test_the_command_resizes_and_gives_an_edit_the_shape_of_its_source(parts, tmp_path, capsys):
    source, out = tmp_path / "wide.png", tmp_path / "out"
    Image.fromarray(np.full((24, 48, 3), 90, np.uint8)).save(source)
    args = ("--model", parts[1], "--image", source, "--prompt", "make it red", "--images", 1,
            "--max_tokens", 0, "--out", out)  # fmt: skip
    with pytest.raises(ValueError, match=r"the image is 24 x 48 .* --resize pad"):
        run_command(capsys, *args)
    run_command(capsys, *args, "--resize", "pad")
    with Image.open(out / "00000_00_0.png") as image:
        assert image.size == (PIXELS, PIXELS // 2)
        note = json.loads(image.text[output.PNG_KEY])
    box = [PIXELS // 4, 0, PIXELS // 2, PIXELS]
    fit = {"policy": "pad", "source": [24, 48], "side": PIXELS, "box": box}
    assert note["resize"] == "pad" and note["resized"] == [fit]
    assert json.loads((out / "results.jsonl").read_text())[0]["resized"] == [fit]


def test_an_interrupted_command_writes_what_is_done(parts, tmp_path, capsys, monkeypatch):
    args = ("--model", parts[1], "--prompt", "hello", "--prompt", "what?", "--max_tokens", 60,
            "--images", 0, "--out", tmp_path / "out")  # fmt: skip

    @contextlib.contextmanager
    def interrupt_after_a_chunk():
        yield types.SimpleNamespace(is_set=lambda: True)

    read_rows = lambda: [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    ]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command.interrupts, "interrupt_flag", interrupt_after_a_chunk)
        run_command(capsys, *args)
    rows = read_rows()
    assert [len(row) for row in rows] == [1, 1] and all(row[0]["truncated"] for row in rows)
    assert "complete" not in run_command(capsys, *args)  # the same command starts over
    for row, full in zip(rows, read_rows()):
        assert full[0]["text"].startswith(row[0]["text"].rstrip("\ufffd"))
    # A text alone is printed while it is sampled, and only once.
    printed = run_command(capsys, "--model", parts[1], "--prompt", "hello", "--max_tokens", 60)
    assert printed.startswith(read_rows()[0][0]["text"])


def test_a_picture_depends_on_its_number_and_not_on_the_batch(parts):
    model = load.load(parts[1])
    options = make_options({"images": 1, "max_tokens": 0, "n": 2, "seed": 42})
    prompts = ["a red circle", "a blue circle"]
    one, two = (
        list(generate.generate_many(model, prompts, options, max_rows=rows)) for rows in (2, 4)
    )
    for first, second in zip(one, two):
        for k in range(2):
            difference = first[k][0].image.astype(int) - second[k][0].image
            assert np.abs(difference).max() <= 1


# ---------------------------------------------------------------------------------- what is refused


def test_invalid_prompts_and_options_are_refused(tmp_path):
    model = tiny_decode_model.model()
    generate_one = lambda prompt, **options: model.generate([prompt], **options)
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "wizard", "content": "hi"}]))
    pixels = np.zeros((8, 9, 3), np.uint8)
    for message, prompt, options in (
        ("prompt 0, message 0: unknown role 'wizard', expected one of none, system, user",
         command_chat(tmp_path / "chat.json"), {}),
        ("content is NoneType", [{"role": "user"}], {}),
        ("expected text or an image, got type 'video'",
         [{"role": "user", "content": [{"type": "video"}]}], {}),
        ("prompt 0, part 0: the model has no codec", [pixels, "a"], {}),
        (r"prompt 0, part 0: latent \(3, 3\), expected \(4, 3\)",
         [Part("image", "user", latent=np.zeros((3, 3)))], {}),
        ("row 0: the prompt is empty", [], {"images": 0}),
        (r"the cache has 40 positions, of which 0 are used; 23 of the prompt and 9 ",
         "hello" * 1, {"cache": 40, "max_tokens": 8, "images": 0}),
        (r"the cache has 64 positions.* and 75 for the answer do not fit",
         "hi", {"cache": 64, "images": 12, "max_tokens": 2}),
        ("guidance=-1.0: expected a number at least 0", "a", {"guidance": -1.0}),
        ("guidance=nan", "a", {"guidance": float("nan")}),
        ("temperature=-0.5: expected a number at least 0", "a", {"temperature": -0.5}),
        ("temperature=inf", "a", {"temperature": float("inf")}),
        ("top_p=1.5: expected a number above 0 and at most 1", "a", {"top_p": 1.5}),
        ("top_p=0.0", "a", {"top_p": 0.0}),
        ("image_temperature=0.0", "a", {"image_temperature": 0.0}),
        ("guidance.rule='sum' is not one of", "a", {"rule": "sum"}),
        (r"null='words' is not one of \('text', 'all'\)", "a", {"null": "words"}),
        ("images=-1", "a", {"images": -1}),
        ("there is nothing to generate", "a", {"images": 0, "max_tokens": 0}),
        (r"unknown option 'guidence'.*guidance", "a", {"guidence": 2.0}),
        ("samples: 2 numbers for 1 rows", "a", {"samples": (1, 2)}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            generate_one(prompt, **options)
    with pytest.raises(ValueError, match="expected a non-empty list with one prompt per row"):
        model.generate("a prompt")


def command_chat(path):
    from starflow2_jax.inference import prompts

    return prompts.read_chat(path)


def test_images_of_another_size_are_not_resized(parts):
    model = load.load(parts[1])
    message = r"prompt 0, part 1: the image is 8 x 9 \(height x width\), but this model takes 16 x"
    with pytest.raises(ValueError, match=message):
        model.generate([["a", np.zeros((8, 9, 3), np.uint8)]])


def test_untrained_parts_of_a_checkpoint_are_refused():
    model = tiny_decode_model.model()
    zero = lambda tree: jax.tree.map(np.zeros_like, tree)
    blind = dataclasses.replace(
        model, params={**model.params, "adapter": zero(model.params["adapter"])}
    )
    with pytest.raises(ValueError, match=r"the adapter is untrained \(last layer is still zero"):
        blind.generate([[image_part(1), "what?"]], images=0)
    assert blind.generate(["draw"], images=1, max_tokens=0)[0][0].kind == "image"
    # The flow reads the source of an edit by itself.
    edited = blind.generate([[image_part(1), "keep it"]], images=1, max_tokens=0)
    assert edited[0][0].kind == "image"
    deep = {**model.params["deep"], "proj_out": zero(model.params["deep"]["proj_out"])}
    mute = dataclasses.replace(model, params={**model.params, "deep": deep})
    with pytest.raises(ValueError, match="the flow is untrained"):
        mute.generate(["draw"], images=1)


def test_continuations_that_are_refused():
    model = tiny_decode_model.model()
    first = model.generate(["a", "b"], images=0, max_tokens=2)
    for message, prompts, options in (
        ("1 for the 2 rows to continue", ["c"], {}),
        ("n and best_of belong to the first call", ["c", "d"], {"n": 2}),
        ("the session was started without guidance", ["c", "d"], {"guidance": 1.0}),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(
                prompts, continue_from=first, **{"max_tokens": 2, "images": 0, **options}
            )
    fixed = model.generate(["a"], images=0, max_tokens=2, cache=48)
    with pytest.raises(ValueError, match="the cache has 48 positions, "):
        model.generate(["c"], continue_from=fixed, images=0, max_tokens=20)


# --------------------------------------------------------------------------------------- clean-up


@pytest.mark.parametrize(
    "flow_options", [pytest.param({}, marks=pytest.mark.slow), OWN_KEYS], ids=["next", "own"]
)
def test_the_score_step_of_an_image_has_the_gradient_of_its_own_density(flow_options, x64):
    """Check the score of the second image of a row against the parallel forward."""
    model = tiny_decode_model.model(flow=flow_options)
    options = {"images": 2, "max_tokens": 2, "seed": 4, "temperature": 1.0, "guidance": 1.0}
    results = model.generate(["ab", "hello"], **options)
    sigma, cfg = 0.3, model.model_config
    special = model.special_tokens
    prompts = [[Part("text", "user", text)] for text in ("ab", "hello")]
    row = [*prompts[0], *results[0]]
    images = [part for part in row if part.kind == "image"]
    batch, _ = scoring.build_batch(model, [row], [np.stack([part.latent for part in images])])
    is_second = np.zeros((1, 2, 1, 1))
    is_second[0, 1] = 1.0

    def density(second):
        latents = batch["latent_mean"] * (1 - is_second) + second * is_second
        terms = scoring._loss_terms(model.params, {**batch, "latent_mean": latents}, cfg=cfg)
        return (sum(terms.log_dets) - terms.half_square)[0, 1]

    # Finite differences: in training no gradient passes through the VLM.
    latent = images[1].latent
    direction = np.random.default_rng(0).standard_normal(latent.shape)
    up, down = (float(density(latent + e * direction)) for e in (1e-5, -1e-5))
    tokens = batch["ids"][0].tolist()
    position = [i for i, token in enumerate(tokens) if token == special.vision_start][1]
    # The prompts were padded to a multiple; the pending item stood at the end.
    lengths = [len(session.layout_parts(p, model.tokenizer, 4, "", "").ids) - 1 for p in prompts]
    padded = -(-max(lengths) // session.LENGTH_STEP) * session.LENGTH_STEP
    start = denoise.ImageStart(
        token=jnp.int32(special.vision_start),
        slot=jnp.int32(padded + position - lengths[0]),
        vlm_position=jnp.int32(batch["positions"][0, position, 0] + 1),
        flow_index=jnp.int32(batch["flow_positions"][0, position, 2]),
    )
    params, state = results.session.params, results.session.state
    denoised = denoise.image_score_step(
        model.params, params, state, 0, start, jnp.asarray(latent), sigma, cfg=cfg
    )
    score = (np.asarray(denoised) - latent) / sigma**2
    assert (score * direction).sum() == pytest.approx((up - down) / 2e-5, rel=1e-6)
    assert np.abs(score).max() > 0.1


def test_denoised_images_are_decoded_and_noisy_latents_are_reported(parts):
    model = load.load(parts[1])
    options = {"images": 2, "max_tokens": 2, "seed": 1}
    plain = model.generate(["a circle"], **options)[0]
    clean = model.generate(["a circle"], **options, denoise=True)[0]
    for a, b in zip(plain, clean):
        assert a.log_likelihood == b.log_likelihood and a.tokens == b.tokens
        if a.kind == "image":
            np.testing.assert_array_equal(a.latent, b.latent)
            assert (a.image != b.image).any()
    silent = {**model.cfg, "noise": {**model.cfg["noise"], "kind": "none"}}
    with pytest.raises(ValueError, match=r"was trained with noise\.kind='none'"):
        dataclasses.replace(model, cfg=silent).generate(["a"], **options, denoise=True)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options, words",
    [
        ({"n": 10**9}, "n=1000000000: expected a whole number from 1 to 1000000"),
        ({"n": 2000, "best_of": 2000}, "n=2000 x best_of=2000: expected at most 1000000 rows"),
        ({"n": True}, "n=True: expected a whole number"),
        ({"top_k": 2**31}, "top_k=2147483648: expected a whole number from 0 to 2147483647"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected a whole number"),
        ({"max_tokens": 1.5}, "max_tokens=1.5: expected a whole number"),
        ({"cache": -1}, "cache=-1: expected a whole number"),
        ({"guidance": float("nan")}, "guidance=nan: expected a number at least 0"),
    ],
)
def test_numbers_of_the_options_have_bounds(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        GenerateOptions(**options)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options", [{"n": 10**6, "max_tokens": 2}, {"max_tokens": 2**31 - 1}, {"cache": 2**31 - 1}]
)
def test_caches_beyond_the_memory_are_refused(options):
    layer = types.SimpleNamespace(kv_heads=2, head_dim=32)
    cfg = types.SimpleNamespace(stacks=((layer, 8), (layer, 8)), num_patches=64)
    model = types.SimpleNamespace(model_config=cfg, has_clean_copies=False)
    checked = GenerateOptions(images=0, **options)
    with pytest.raises(ValueError, match=r"rows of \d+ positions needs at least .* \(the caches"):
        generate._check_memory(model, 1, checked)
    generate._check_memory(model, 1, GenerateOptions(images=0))
