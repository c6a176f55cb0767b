"""The latent codec's figures: PSNR against closed forms, and a probe of known latents."""

import json

import numpy as np
import pytest
from absl import flags
from helpers.tiny_fae import SIDE, dataset
from PIL import Image

from starflow2_jax import evaluate
from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.evaluation import codec as codec_evaluation
from starflow2_jax.latents import codec as latent_codec
from starflow2_jax.shapes import generator, holdout, tasks
from starflow2_jax.shapes.generator import Object, Scene


def test_psnr_is_that_of_the_masked_pixels():
    image = np.full((4, 4, 3), 100, np.uint8)
    other = image.copy()
    other[:2] += 10
    assert codec_evaluation.psnr(image, other) == pytest.approx(10 * np.log10(255**2 / 50))
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    assert codec_evaluation.psnr(image, other, mask) == pytest.approx(10 * np.log10(255**2 / 100))
    assert codec_evaluation.psnr(image, image) == pytest.approx(10 * np.log10(255**2 / 0.01))
    # Differences below zero do not wrap around.
    assert codec_evaluation.psnr(other, image) == codec_evaluation.psnr(image, other)


def test_objects_are_inside_their_boxes_and_not_in_the_background():
    item = Object("circle", "red", "large", 0.5, 0.25)
    scene = Scene("white", 8.0, (item,))
    image = generator.draw(scene, 64)
    background = codec_evaluation.background(image, scene)
    boxes = codec_evaluation.object_boxes(scene, 64)
    differs = (background != image).any(-1)
    # The pixels of a circle are inside its box, and reach near each side of it.
    assert differs.any() and not (differs & ~boxes).any()
    rows, columns = np.where(differs)
    assert boxes.sum() <= (np.ptp(rows) + 6) * (np.ptp(columns) + 6)
    assert background[0].mean() < background[-1].mean()
    pixels = np.zeros((3, 3, 3), np.uint8)
    pixels[0, 0] = 200
    median = codec_evaluation.background(pixels, None)
    assert median.shape == (3, 3, 3) and not median.any()


def test_noise_depends_on_the_index_of_the_image(codec):
    latents = np.zeros((5, 4, 4), np.float32)
    noisy = codec_evaluation.add_noise(latents, 0.3, 0, 0)
    assert np.abs(noisy.std() - 0.3) < 0.1
    np.testing.assert_array_equal(codec_evaluation.add_noise(latents[3:], 0.3, 0, 3), noisy[3:])
    assert (codec_evaluation.add_noise(latents, 0.3, 1, 0) != noisy).all()


def test_fidelity_is_the_mean_over_single_images(codec, tmp_path, monkeypatch):
    data = dataset(tmp_path / "data")
    monkeypatch.setattr(codec_evaluation, "BATCH_SIZE", 7)
    figures, examples = codec_evaluation.measure_fidelity(codec, data, rows=20, keep=9)
    assert figures["images"] == 20 and examples.shape == (27, SIDE, SIDE, 3)
    values = {name: [] for name in ("mean", "noisy", "blank", "mean_boxes")}
    for i, image in zip(range(20), codec_evaluation.read_images(data, SIDE)):
        pixels = image.pixels
        _, decoded, noisy = codec_evaluation.reconstruct(codec, pixels[None], 0.3, 0, i)
        boxes = codec_evaluation.object_boxes(image.scene, SIDE)
        background = codec_evaluation.background(pixels, image.scene)
        values["mean"].append(codec_evaluation.psnr(pixels, decoded[0]))
        values["noisy"].append(codec_evaluation.psnr(pixels, noisy[0]))
        values["blank"].append(codec_evaluation.psnr(pixels, background))
        values["mean_boxes"].append(codec_evaluation.psnr(pixels, decoded[0], boxes))
        if i < 9:
            np.testing.assert_array_equal(examples[3 * i], pixels)
            np.testing.assert_allclose(examples[3 * i + 2], noisy[0].astype(int), atol=1)

    def near(value):
        # Programs of other batch sizes differ in the last bit, which may round a pixel otherwise.
        return pytest.approx(value, rel=1e-4)

    for name, rows in values.items():
        assert figures[name]["psnr"] == near(np.mean(rows)), name
        low, high = figures[name]["psnr_95"]
        assert high - low == near(2 * 1.96 * np.std(rows, ddof=1) / 20**0.5), name
    assert figures["noisy"]["psnr"] != figures["mean"]["psnr"]


def test_every_image_of_a_record_counts_and_has_its_scene(codec, tmp_path):
    rows = list(tasks.make_records(0, 12, SIDE, tasks=("edit", "reason", "multi", "text")))
    records.write(tmp_path / "data", rows)
    loaded = list(codec_evaluation.read_images(str(tmp_path / "data"), SIDE))
    assert len(loaded) == sum(len(record.imgs) for record in rows)
    for image in loaded:
        if image.scene is not None:
            np.testing.assert_array_equal(image.pixels, generator.draw(image.scene, SIDE))
    # Only a zoomed image has no scene.
    assert 0 < sum(image.scene is None for image in loaded) < len(loaded) / 4
    with pytest.raises(ValueError, match="no image of the shapes benchmark with one object"):
        codec_evaluation.measure_probe(
            codec, *[dataset(tmp_path / "two", 4, tags=("two_object",))] * 2
        )


@pytest.mark.fast
@pytest.mark.parametrize(
    "meta",
    [
        {"scene": "[" * 100_000},
        {"scene": "{"},
        {"scene": "3"},
        {"scenes": '{"a": 1}'},
        {"scenes": '[{"background": "red", "ramp": 1}]'},
        {"scenes": '[{"background": "red", "ramp": 1, "objects": [{"a": 1}]}]'},
    ],
)
def test_a_scene_that_is_none_is_named(meta):
    (name,) = meta
    with pytest.raises(DatasetError, match=f"record 7: meta.{name} is no scene of the shapes"):
        codec_evaluation.parse_scenes(meta, "record 7")
    assert codec_evaluation.parse_scenes({"label": 1}, "record 7") == []


def test_photographs_are_scaled_only_on_request(codec, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        blob = records.image_blob(images.encode_png(pixels), str(i))
        rows.append(records.text_to_image(str(i), "noise", "noise", blob))
    records.write(tmp_path / "data", rows)
    data = str(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"the image is 8 x 8 .*center_crop"):
        codec_evaluation.measure_fidelity(codec, data)
    figures, _ = codec_evaluation.measure_fidelity(codec, data, resize="center_crop")
    assert figures["images"] == 3 and "mean_boxes" not in figures


def test_the_probe_reads_linear_features_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    latents = rng.normal(size=(400, 5, 3)).astype(np.float32)

    def correct(x):
        predicted = codec_evaluation.classify(x[:300], labels[:300], x[300:], 4)
        return predicted == labels[300:]

    assert correct(codec_evaluation.probe_features(latents)["flattened"]).mean() < 0.5
    directions = rng.normal(size=(4, 3)) @ rng.normal(size=(3, 3))
    latents += 4 * directions[labels][:, None].astype(np.float32)
    for features in codec_evaluation.probe_features(latents).values():
        assert correct(features).mean() > 0.95
        # A constant feature does no harm.
        with_constant = np.concatenate([features, np.ones((400, 1), np.float32)], -1)
        np.testing.assert_array_equal(correct(with_constant), correct(features))


def test_held_out_pairs_are_not_fitted_and_are_reported_separately(codec, tmp_path, monkeypatch):
    """Latents that name color and shape outright are read, on held-out pairs too."""
    fit = dataset(tmp_path / "fit", 160, tags=("single_object",))
    data = dataset(tmp_path / "data", 80, tags=("single_object", "two_object"), seed=1)
    objects_of_calls = []
    original = codec_evaluation.encode_single_objects

    def one_hot_latents(codec, path, rows, resize):
        _, objects = original(codec, path, rows, resize)
        latents = np.zeros((len(objects), 2, 16), np.float32)
        for k, item in enumerate(objects):
            latents[k, :, list(generator.COLORS).index(item.color)] = 1
            latents[k, :, 8 + generator.SHAPES.index(item.shape)] = 1
        objects_of_calls.append(objects)
        return latents, objects

    monkeypatch.setattr(codec_evaluation, "encode_single_objects", one_hot_latents)
    result = codec_evaluation.measure_probe(codec, fit, data)
    fit_objects, objects = objects_of_calls
    num_fitted = sum(not holdout.is_withheld_pair(item) for item in fit_objects)
    assert result["fit_images"] == num_fitted < 160
    for view in ("pooled", "flattened"):
        for name in ("color", "shape"):
            trained, held_out = result[view][name]["seen"], result[view][name]["held_out"]
            assert trained["accuracy"] == held_out["accuracy"] == 1
            assert trained["images"] + held_out["images"] == len(objects) == 40
            assert held_out["images"] == sum(map(holdout.is_withheld_pair, objects))


def run_command(capsys, **kwargs):
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *(f"--{name}={value}" for name, value in kwargs.items())])
    evaluate.main("codec", [], values)
    return capsys.readouterr().out


def test_the_command_writes_figures_and_images(codec, tmp_path, capsys):
    latent_codec.export(codec, str(tmp_path / "model"))
    data, out = dataset(tmp_path / "data"), tmp_path / "results" / "codec.json"
    kwargs = {"model": tmp_path / "model", "data": data, "rows": 12, "pictures": 4, "out": out}
    printed = run_command(capsys, fit=data, **kwargs)
    result = json.loads(out.read_text())
    loaded = latent_codec.load(str(tmp_path / "model"))
    figures, _ = codec_evaluation.measure_fidelity(loaded, data, rows=12)
    assert {name: result[name] for name in figures} == figures
    assert f"{figures['mean']['psnr']:5.2f}" in printed
    assert "probe      pooled latents, color" in printed
    assert result["protocol"]["sigma"] == 0.3 and result["model"]["encoder"] == codec.sha256
    assert len(result["data"]["fingerprint"]) == len(result["model"]["sha256"]) == 64
    with Image.open(out.with_suffix(".png")) as grid:
        assert grid.width > 12 * SIDE
    with pytest.raises(FileExistsError, match=r"codec\.json exists already; --overwrite"):
        run_command(capsys, **kwargs)
    out.unlink()
    Image.new("RGB", (8, 8)).save(out.with_suffix(".png"))  # not of this command
    with pytest.raises(FileExistsError, match=r"codec\.png exists already; --overwrite"):
        run_command(capsys, **kwargs)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.json"):
        run_command(capsys, **{**kwargs, "out": tmp_path / "codec.png"})
    without_noise = json.loads(run_command(capsys, json=True, sigma=0, **{**kwargs, "out": ""}))
    assert without_noise["noisy"] == without_noise["mean"] and without_noise["probe"] is None
    with pytest.raises(ValueError, match="--model and --data are needed"):
        run_command(capsys)
