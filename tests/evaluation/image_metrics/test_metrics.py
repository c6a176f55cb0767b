"""The arithmetic of image metrics against other computations, with random weights."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

from starflow2_jax.data import records
from starflow2_jax.evaluation.image_metrics import adm_npz, metrics, networks, samples
from starflow2_jax.inference import output
from starflow2_jax.shapes import generator

pytestmark = pytest.mark.fast


def random_images(seed, count=40, side=16):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_npz_is_that_of_numpy(tmp_path):
    images = random_images(0)
    adm_npz.write(tmp_path / "a.npz", [images[:7], images[7:]], len(images))
    np.savez(tmp_path / "b.npz", images)
    with np.load(tmp_path / "a.npz") as written, np.load(tmp_path / "b.npz") as reference:
        assert written.files == reference.files == ["arr_0"]
        np.testing.assert_array_equal(written["arr_0"], reference["arr_0"])
    np.testing.assert_array_equal(adm_npz.read(tmp_path / "b.npz"), images)
    with pytest.raises(ValueError, match="40 images, expected 41"):
        adm_npz.write(tmp_path / "c.npz", [images], 41)
    with pytest.raises(ValueError, match="float32"):
        adm_npz.write(tmp_path / "c.npz", [images.astype(np.float32)], 40)
    assert not (tmp_path / "c.npz").exists()
    np.savez(tmp_path / "d.npz", images=images)
    with pytest.raises(ValueError, match=r"d\.npz: no \.npz with an array arr_0"):
        adm_npz.read(tmp_path / "d.npz")


def test_images_are_read_from_folders_and_npz(tmp_path):
    images = random_images(1, 3)
    for i, image in enumerate(images):
        output.save_png(tmp_path / "folder" / f"{i:05d}.png", image, {})
    np.testing.assert_array_equal(samples.read_images(str(tmp_path / "folder")), images)
    output.save_png(tmp_path / "folder" / "00003.png", images[0][:8], {})
    with pytest.raises(ValueError, match=r"00003\.png: \(8, 16\), but 00000\.png \(16, 16\)"):
        samples.read_images(str(tmp_path / "folder"))
    rows = list(generator.make_records(3, 5, 32))
    records.write(tmp_path / "data", rows)
    real = samples.read_real(str(tmp_path / "data"), 4, 16)
    assert real.images.shape == (4, 16, 16, 3) and len(real.prompts) == 4
    assert real.captions == [row.segs[0].s for row in rows[:4]] and real.labels is None


def test_precision_and_recall_are_shares_of_manifolds():
    random = np.random.default_rng(0)
    real, generated = random.normal(size=(60, 5)), random.normal(size=(50, 5)) * 0.5

    def share(rows, centers):
        inside = 0
        for row in rows:
            for center in centers:
                distances = np.sort(np.linalg.norm(centers - center, axis=1))
                if np.linalg.norm(row - center) <= distances[3]:
                    inside += 1
                    break
        return inside / len(rows)

    result = metrics.precision_recall(generated, real)
    assert result["precision"] == share(generated, real)
    assert result["recall"] == share(real, generated)
    assert result["precision"] > 0.9 > 0.6 > result["recall"]  # a narrow model
    assert metrics.precision_recall(real, real) == {"precision": 1, "recall": 1}
    assert metrics.precision_recall(real + 99, real) == {"precision": 0, "recall": 0}
    with pytest.raises(ValueError, match="more than 3 images"):
        metrics.precision_recall(real[:3], real)


def test_what_has_no_weights_is_named(monkeypatch, tmp_path):
    images = random_images(0, 8)
    figures, missing = metrics.measure(images, images, None)
    assert figures == {"images": 8, "real_images": 8}
    assert set(missing) == {"frechet_distance, precision, recall", "clip_score"}
    with pytest.raises(FileNotFoundError, match="--inception missing"):
        networks.open_inception("missing")
    with pytest.raises(FileNotFoundError, match=r"--clip .*: there is no config\.json"):
        networks.open_clip(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install 'starflow2_jax\[metrics\]'"):
        metrics.frechet_distance(np.zeros((4, 2)), np.zeros((4, 2)))


def frechet_reference(a, b):
    difference = a.mean(0) - b.mean(0)
    covariances = [np.cov(rows, rowvar=False) for rows in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return difference @ difference + np.trace(sum(covariances) - 2 * np.real(root))


def test_frechet_distance_of_a_random_network():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16 * 16 * 3, 12), torch.nn.Tanh()
    ).double()
    pixels = SimpleNamespace(real=random_images(0, 50), drawn=random_images(1, 40) // 2)

    def scale(x):
        return network(x.double() / 255)

    weight, bias = (p.detach().numpy() for p in network[1].parameters())
    a, b = (
        np.tanh(x.transpose(0, 3, 1, 2).reshape(len(x), -1) / 255 @ weight.T + bias)
        for x in (pixels.drawn, pixels.real)
    )
    np.testing.assert_allclose(networks.features(scale, pixels.drawn, 16), a)
    figures, missing = metrics.measure(pixels.drawn, pixels.real, ["x"] * 40, inception=scale)
    assert figures["frechet_distance"] == pytest.approx(frechet_reference(a, b), rel=1e-6)
    expected = metrics.precision_recall(a, b)
    assert {name: figures[name] for name in expected} == expected and set(missing) == {"clip_score"}
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def write_tiny_clip(folder):
    """Write a CLIP with random weights and a tokenizer of single letters."""
    import transformers

    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[]
    )
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8,
            "eos_token_id": len(words) - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    image_processor = transformers.CLIPImageProcessor(**sizes)
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def test_clip_score_is_the_mean_cosine(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    write_tiny_clip(tmp_path)
    clip = networks.open_clip(str(tmp_path))
    images, captions = random_images(0, 5), ["a b", "c", "d e f", "a b c d e f g h", "z"]
    score = metrics.clip_score(clip, images, captions, batch_size=2)
    model, processor = clip
    cosines = []
    for image, caption in zip(images, captions):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        assert inputs["input_ids"].shape[1] <= 8 and inputs["input_ids"][0, -1] == 53
        with torch.no_grad():
            result = model.model(**inputs)
        cosines.append(float((result.image_embeds * result.text_embeds).sum()))
    assert score == pytest.approx(max(100 * np.mean(cosines), 0), abs=1e-3)
    figures, missing = metrics.measure(images, images[::-1], captions, clip=clip)
    assert figures["clip_score"] == pytest.approx(score)
    assert figures["clip_score_of_real_images"] != figures["clip_score"]
    assert set(missing) == {"frechet_distance, precision, recall"}
    assert metrics.protocol(None, str(tmp_path))["weights"]["clip"]["sha256"]
