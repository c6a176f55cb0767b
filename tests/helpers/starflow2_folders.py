"""Folders of a tiny VLM and a tiny codec, and a STARFlow2 run that uses both."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from helpers import interleaved_dataset
from helpers.tiny_fae import make_run
from starflow2_jax import config, params
from starflow2_jax.checkpoints import orbax
from starflow2_jax.checkpoints.convert import qwen as qwen_weights, teacher
from starflow2_jax.inference import vlm
from starflow2_jax.latents import codec
from starflow2_jax.models import qwen, qwen_vision, starflow2
from starflow2_jax.models.fae import codec as fae

PIXELS = 16


def make(root):
    """Write a tiny VLM in `vlm`, a tiny codec in `fae` and a run of both; return (root, run)."""
    _, tokenizer_folder = interleaved_dataset.make(root, count=8, pixels=PIXELS, patch=4, merge=1)
    tokenizer = json.loads(Path(tokenizer_folder, "tokenizer.json").read_text())
    tower = qwen_vision.VisionConfig(
        depth=1, width=16, heads=2, mlp_width=24, out_width=32, full_layers=(0,), patch=4,
        window=16, merge=1,
    )  # fmt: skip
    vlm_config = qwen.QwenConfig(
        vocab=400, width=32, layers=2, heads=2, kv_heads=1, mlp_width=48, sections=(2, 3, 3),
        tied=True, image_token=5, video_token=6, vision_start_token=3, vision_end_token=4,
        vision=tower,
    )  # fmt: skip
    assert len(tokenizer["model"]["vocab"]) <= 400
    vlm_params = params.init(jax.random.key(1), qwen.declare(vlm_config))
    cfg = config.default()
    cfg.task, cfg.image.pixels = "vlm", PIXELS
    vlm.export(vlm.VLM(cfg, vlm_config, vlm_params, tokenizer_folder), str(root / "vlm"))
    features_codec = codec.load(make_run(root / "features", 0))
    decoder = params.init(jax.random.key(2), fae.declare(features_codec.model)["pixel_decoder"])
    full_codec = dataclasses.replace(
        features_codec, cfg={**features_codec.cfg, "task": "fae_pixels"},
        params={**features_codec.params, "pixel_decoder": decoder},
    )  # fmt: skip
    codec.export(full_codec, str(root / "fae"))
    return root, save_run(root / "run", root, features_codec)


def save_run(workdir, root, latent_codec, noise=0.3, trainable=starflow2.SUBTREES, **frozen):
    """Write the checkpoint of a run of stage 3, and return its folder."""
    cfg = config.default()
    cfg.task, cfg.train.trainable = "starflow2", trainable
    sizes = {"side": 2, "channels": 4, "width": 40, "head_dim": 20, "layers": (1, 1, 2)}
    cfg.model.update({"vlm": {}, "flow": sizes})
    cfg.vlm.path, cfg.text.tokenizer = str(root / "vlm"), str(root / "vlm")
    cfg.fae.path, cfg.noise.sigma = str(root / "fae"), 0.1
    cfg = config.to_dict(cfg)
    flow_config = starflow2.flow_config(32, **sizes)
    model_config = starflow2.preset("tiny", vlm=qwen_config(root), flow=flow_config)
    tree = params.init(jax.random.key(0), starflow2.declare(model_config))
    rng = np.random.default_rng(0)
    trained = {
        name: jax.tree.map(
            lambda a: a + noise * rng.standard_normal(a.shape, np.float32), tree[name]
        )
        for name in trainable
    }
    vlm_digest = teacher.identity(str(root / "vlm"))
    frozen_digests = {"vlm": vlm_digest, "fae": latent_codec.sha256, **frozen}
    writer = orbax.open(workdir)
    state = {"step": jnp.int32(1), "params": jax.tree.map(lambda a: a + 1, trained), "ema": trained}
    orbax.save(writer, 1, state, {"config": cfg, "step": 1, "frozen": frozen_digests})
    orbax.close(writer)
    return str(workdir)


def qwen_config(root):
    """Return the configuration of the VLM in `root`."""
    return qwen_weights.load(root / "vlm", only=("embed",))[0]
