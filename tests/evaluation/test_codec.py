"""The latent codec's figures: PSNR against closed forms, a probe that reads what is there."""

import json

import numpy as np
import pytest
from absl import flags
from helpers.tiny_fae import SIDE, dataset
from PIL import Image

from starflow2_jax import evaluate
from starflow2_jax.data import images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.evaluation import codec as codec_eval
from starflow2_jax.latents import codec as codecs
from starflow2_jax.shapes import generator, holdout, tasks
from starflow2_jax.shapes.generator import Object, Scene


def test_psnr():
    image = np.full((4, 4, 3), 100, np.uint8)
    other = image.copy()
    other[:2] += 10
    assert codec_eval.psnr(image, other) == pytest.approx(10 * np.log10(255**2 / 50))
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    assert codec_eval.psnr(image, other, mask) == pytest.approx(10 * np.log10(255**2 / 100))
    assert codec_eval.psnr(image, image) == pytest.approx(10 * np.log10(255**2 / 0.01))
    # Differences below zero do not wrap around.
    assert codec_eval.psnr(other, image) == codec_eval.psnr(image, other)


def test_blank_grounds_and_boxes():
    item = Object("circle", "red", "large", 0.5, 0.25)
    scene = Scene("white", 8.0, (item,))
    picture = codec_eval.Picture(generator.draw(scene, 64), scene)
    ground, inside = codec_eval.blank(picture), codec_eval.boxes(scene, 64)
    differs = (ground != picture.pixels).any(-1)
    # What a circle changes is in its box and reaches near each side of it.
    assert differs.any() and not (differs & ~inside).any()
    rows, columns = np.where(differs)
    assert inside.sum() <= (np.ptp(rows) + 6) * (np.ptp(columns) + 6)
    assert ground[0].mean() < ground[-1].mean()
    pixels = np.zeros((3, 3, 3), np.uint8)
    pixels[0, 0] = 200
    plain = codec_eval.blank(codec_eval.Picture(pixels, None))
    assert plain.shape == (3, 3, 3) and not plain.any()


def test_noise_is_that_of_the_image(codec):
    latents = np.zeros((5, 4, 4), np.float32)
    whole = codec_eval.noisy(latents, 0.3, 0, 0)
    assert np.abs(whole.std() - 0.3) < 0.1
    np.testing.assert_array_equal(codec_eval.noisy(latents[3:], 0.3, 0, 3), whole[3:])
    assert (codec_eval.noisy(latents, 0.3, 1, 0) != whole).all()


def test_fidelity_is_that_of_single_images(codec, tmp_path, monkeypatch):
    data = dataset(tmp_path / "data")
    monkeypatch.setattr(codec_eval, "ROWS", 7)
    found, shown = codec_eval.fidelity(codec, data, rows=20, keep=9)
    assert found["images"] == 20 and shown.shape == (27, SIDE, SIDE, 3)
    values = {name: [] for name in ("mean", "noisy", "blank", "mean_boxes")}
    for i, picture in zip(range(20), codec_eval.pictures(data, SIDE)):
        _, plain, rough = codec_eval.reconstruct(codec, [picture], 0.3, 0, i)
        inside = codec_eval.boxes(picture.scene, SIDE)
        values["mean"].append(codec_eval.psnr(picture.pixels, plain[0]))
        values["noisy"].append(codec_eval.psnr(picture.pixels, rough[0]))
        values["blank"].append(codec_eval.psnr(picture.pixels, codec_eval.blank(picture)))
        values["mean_boxes"].append(codec_eval.psnr(picture.pixels, plain[0], inside))
        if i < 9:
            np.testing.assert_array_equal(shown[3 * i], picture.pixels)
            np.testing.assert_allclose(shown[3 * i + 2], rough[0].astype(int), atol=1)
    # Programs of other batch sizes differ in the last bit, which may round a pixel otherwise.
    near = lambda value: pytest.approx(value, rel=1e-4)
    for name, rows in values.items():
        assert found[name]["psnr"] == near(np.mean(rows)), name
        low, high = found[name]["psnr_95"]
        assert high - low == near(2 * 1.96 * np.std(rows, ddof=1) / 20**0.5), name
    assert found["noisy"]["psnr"] != found["mean"]["psnr"]


def test_every_image_of_a_record_counts_and_has_its_scene(codec, tmp_path):
    made = list(tasks.make_records(0, 12, SIDE, tasks=("edit", "reason", "multi", "text")))
    records.write(tmp_path / "data", made)
    shown = list(codec_eval.pictures(str(tmp_path / "data"), SIDE))
    assert len(shown) == sum(len(record.imgs) for record in made)
    for picture in shown:
        if picture.scene is not None:
            np.testing.assert_array_equal(picture.pixels, generator.draw(picture.scene, SIDE))
    # Only a zoomed picture has none.
    assert 0 < sum(picture.scene is None for picture in shown) < len(shown) / 4
    with pytest.raises(ValueError, match="no image of the shapes world with one object"):
        codec_eval.probe(codec, *[dataset(tmp_path / "two", 4, tags=("two_object",))] * 2)


def test_photographs_are_scaled_only_where_asked(codec, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        blob = records.image_blob(images.encode_png(pixels), str(i))
        rows.append(records.text_to_image(str(i), "noise", "noise", blob))
    records.write(tmp_path / "data", rows)
    data = str(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"the image is 8 x 8 .*center_crop"):
        codec_eval.fidelity(codec, data)
    found, _ = codec_eval.fidelity(codec, data, resize="center_crop")
    assert found["images"] == 3 and "mean_boxes" not in found


def test_the_probe_reads_what_is_linear_and_nothing_else():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 4, 400)
    latents = rng.normal(size=(400, 5, 3)).astype(np.float32)
    read = lambda x: codec_eval.classify(x[:300], wanted[:300], x[300:], 4) == wanted[300:]
    assert read(codec_eval.views(latents)["flattened"]).mean() < 0.5
    turned = rng.normal(size=(4, 3)) @ rng.normal(size=(3, 3))
    latents += 4 * turned[wanted][:, None].astype(np.float32)
    for view in codec_eval.views(latents).values():
        assert read(view).mean() > 0.95
        # A channel that never changes does no harm.
        still = np.concatenate([view, np.ones((400, 1), np.float32)], -1)
        np.testing.assert_array_equal(read(still), read(view))


def test_withheld_pairs_are_not_learnt_from_and_are_told_apart(codec, tmp_path, monkeypatch):
    """Latents that say colour and shape outright are read, on unseen pairs too."""
    fit = dataset(tmp_path / "fit", 160, tags=("single_object",))
    data = dataset(tmp_path / "data", 80, tags=("single_object", "two_object"), seed=1)
    taught = []
    original = codec_eval.singles

    def told(codec, path, rows, resize):
        _, objects = original(codec, path, rows, resize)
        said = np.zeros((len(objects), 2, 16), np.float32)
        for k, item in enumerate(objects):
            said[k, :, list(generator.COLORS).index(item.color)] = 1
            said[k, :, 8 + generator.SHAPES.index(item.shape)] = 1
        taught.append(objects)
        return said, objects

    monkeypatch.setattr(codec_eval, "singles", told)
    found = codec_eval.probe(codec, fit, data)
    assert (
        found["fit_images"] == sum(not holdout.is_withheld_pair(item) for item in taught[0]) < 160
    )
    for view in ("pooled", "flattened"):
        for name in ("color", "shape"):
            row = found[view][name]
            assert row["seen"]["accuracy"] == row["withheld"]["accuracy"] == 1
            assert row["seen"]["images"] + row["withheld"]["images"] == len(taught[1]) == 40
            assert row["withheld"]["images"] == sum(map(holdout.is_withheld_pair, taught[1]))


def run_command(capsys, **given):
    values = flags.FlagValues()
    evaluate.define(values)
    values(["evaluate", *(f"--{name}={value}" for name, value in given.items())])
    evaluate.main("codec", [], values)
    return capsys.readouterr().out


def test_the_command(codec, tmp_path, capsys):
    codecs.export(codec, str(tmp_path / "model"))
    data, out = dataset(tmp_path / "data"), tmp_path / "found" / "codec.json"
    given = {"model": tmp_path / "model", "data": data, "rows": 12, "pictures": 4, "out": out}
    said = run_command(capsys, fit=data, **given)
    result = json.loads(out.read_text())
    direct, _ = codec_eval.fidelity(codecs.load(str(tmp_path / "model")), data, rows=12)
    assert {name: result[name] for name in direct} == direct
    assert f"{direct['mean']['psnr']:5.2f}" in said and "probe      pooled latents, color" in said
    assert result["protocol"]["sigma"] == 0.3 and result["model"]["encoder"] == codec.sha256
    assert len(result["data"]["fingerprint"]) == len(result["model"]["sha256"]) == 64
    with Image.open(out.with_suffix(".png")) as grid:
        assert grid.width > 12 * SIDE
    with pytest.raises(FileExistsError, match=r"codec\.json is there already; --overwrite"):
        run_command(capsys, **given)
    out.rename(tmp_path / "moved.json")
    with pytest.raises(FileExistsError, match=r"codec\.png is there already; --overwrite"):
        run_command(capsys, **given)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.json"):
        run_command(capsys, **{**given, "out": tmp_path / "codec.png"})
    other = json.loads(run_command(capsys, json=True, sigma=0, **{**given, "out": ""}))
    assert other["noisy"] == other["mean"] and other["probe"] is None
    with pytest.raises(ValueError, match="--model and --data are needed"):
        run_command(capsys)
