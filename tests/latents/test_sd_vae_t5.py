"""Offline latents and text features against diffusers and transformers, on tiny random models."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest

from starflow2_jax.data import array_store, images, records
from starflow2_jax.data.manifest import DatasetError
from starflow2_jax.latents import sd_vae_t5

CAPTIONS = ["a cat", "a dog and a cat", "dog", "a cat and a dog and a dog", "and"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    vae.save_pretrained(root / "vae")
    config = transformers.T5Config(
        vocab_size=16,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(config).save_pretrained(root / "t5")
    words = {w: k for k, w in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "dog", "and"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(root / "t5")
    return root


@pytest.fixture
def data(tmp_path):
    def produce():
        rng = np.random.default_rng(0)
        for k, caption in enumerate(CAPTIONS):
            pixels = rng.integers(0, 256, (16, 20, 3), np.uint8)
            blob = records.image_blob(images.encode_png(pixels), "x")
            yield records.text_to_image(f"r{k}", "t", caption, blob)

    records.write(tmp_path / "data", produce(), shard_bytes=2000)
    return tmp_path / "data"


def test_to_tokens_is_raster_then_row_column_channel():
    latents = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    tokens = sd_vae_t5.to_tokens(latents, 2)
    assert tokens.shape == (2, 6, 12)
    # Token 4 is the second row of patches, second column; entry 8 its pixel (1, 0), channel 2.
    assert tokens[1, 4, 8] == latents[1, 2, 2 + 1, 2 + 0]
    assert (sd_vae_t5.to_tokens(latents, 1)[0, 7] == latents[0, :, 1, 1]).all()
    with pytest.raises(DatasetError, match="patches of 4"):
        sd_vae_t5.to_tokens(latents, 4)


def test_latents_and_text_equal_the_public_models(models, data, tmp_path):
    import torch
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    options = sd_vae_t5.FeatureOptions(text_length=5, pixels=16, batch_size=2)
    vae_folder, t5_folder = str(models / "vae"), str(models / "t5")
    sd_vae_t5.write(tmp_path / "f", data, options, vae=vae_folder, t5=t5_folder)
    dataset = records.read(data)
    stored = array_store.read(tmp_path / "f", dataset.manifest)
    assert [s.records for s in stored.manifest.shards] == [
        s.records for s in dataset.manifest.shards
    ]
    vae = AutoencoderKL.from_pretrained(models / "vae").eval()
    t5, tokenizer = (
        T5EncoderModel.from_pretrained(models / "t5", trust_remote_code=False).eval(),
        AutoTokenizer.from_pretrained(models / "t5", trust_remote_code=False),
    )
    for k, record in enumerate(dataset):
        name, row = stored[k]
        assert name == record.id
        pixels = records.target_image(record, "x")[:, 2:18]
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            ids = tokenizer(CAPTIONS[k], return_tensors="pt")["input_ids"][:, :5]
            if ids.shape[1] == 5:
                ids[0, -1] = 1  # cut captions keep their end token
            hidden = t5(input_ids=ids).last_hidden_state[0].numpy()
        mean = posterior.mean[0].permute(1, 2, 0).reshape(-1, 4).numpy() * 0.18215
        std = posterior.std[0].permute(1, 2, 0).reshape(-1, 4).numpy() * 0.18215
        assert row["latent_mean"].shape == (64, 4) and row["text"].shape == (5, 8)
        np.testing.assert_allclose(row["latent_mean"], mean, atol=1e-5)
        np.testing.assert_allclose(np.exp(0.5 * row["latent_logvar"]), std, atol=1e-5)
        np.testing.assert_allclose(row["text"][: len(hidden)], hidden, atol=1e-5)
        assert (row["text"][len(hidden) :] == 0).all()

    features = stored.manifest.features
    assert features["vae"]["scale"] == 0.18215 and features["vae"]["pixels"] == 16
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(features["vae"]["files"])
    assert np.array(features["null_text"]).shape == (1, 8)
    assert str(models) not in json.dumps(features)

    sd_vae_t5.write(tmp_path / "again", data, options, vae=vae_folder, t5=t5_folder)
    for name in os.listdir(tmp_path / "f"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_wrong_folders_are_named(models, data, tmp_path):
    options = sd_vae_t5.FeatureOptions()
    for kwargs, message in (
        (dict(vae=None, t5=None), "nothing to compute"),
        (dict(vae=str(tmp_path), t5=None), r"no config\.json"),
        (dict(vae=str(models / "t5"), t5=None), "not the config of an AutoencoderKL"),
    ):
        with pytest.raises(DatasetError, match=message):
            sd_vae_t5.write(tmp_path / "f", data, options, **kwargs)
    with pytest.raises(DatasetError, match="exists"):
        sd_vae_t5.write(data, data, options, vae=str(models / "vae"), t5=None)


def test_without_the_extra_the_error_names_it(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sd_vae_t5.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"starflow2_jax\[features\]"):
        sd_vae_t5.write(tmp_path / "f", data, sd_vae_t5.FeatureOptions(), vae="x", t5=None)


def test_no_code_of_a_t5_folder_runs(models, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(models / "t5", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'OWNED')!r}, 'w')")
    # transformers may take its own class for the folder instead.
    with contextlib.suppress(DatasetError):
        sd_vae_t5._open_t5(str(folder), sd_vae_t5.FeatureOptions())
    assert not (folder / "OWNED").exists()


def test_a_caption_that_names_a_special_token_is_text(models):
    encode, _ = sd_vae_t5._open_t5(str(models / "t5"), sd_vae_t5.FeatureOptions(text_length=16))
    (length,) = encode(["</s>"])[1]
    assert length > 2  # the characters of the name, and one end
