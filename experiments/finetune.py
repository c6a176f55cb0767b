"""python -m starflow2_jax.train --config experiments/finetune.py --config.data.path=data/mine --workdir runs/mine

STARFlow2 on a dataset of one's own: stage 3 goes on from a trained model, the shipped one or what
stands behind a colon, a model folder, a workdir or a step in it:
    --config experiments/finetune.py:models/starflow2
What that model is, its VLM, codec, tokenizer, noise and rows are taken from there. Images of other
sizes are scaled and cropped. They are encoded while it trains (`fae.path`); latents made before by
prepare latents are read instead where --config.data.latents names them.
Data: prepare import, of whatever kinds of records the model is to learn (docs/data.md).
--config.eval_data.path=FOLDER measures, and shows in the grids, what is not trained on.
"""  # noqa: E501

from starflow2_jax import config
from starflow2_jax.inference import load

SHIPPED = "pretrained/starflow2_tiny"


def get_config(source: str = SHIPPED):
    """The resolved configuration of a training that starts from the model `source`."""
    found = load.read_config(source)
    cfg = config.default()
    cfg.name, cfg.task = "finetune", "starflow2"
    cfg.model.update(found["model"])
    for name in ("compute_dtype", "frozen_dtype"):
        cfg[name] = found[name]
    for group in ("text", "noise", "loss"):
        cfg[group].update(found[group])
    cfg.vlm.path, cfg.fae.path = found["vlm"]["path"], found["fae"]["path"]
    cfg.init["from"] = source
    cfg.train.trainable = ("adapter", "shallow", "deep", "skip")
    cfg.cfg_dropout.text = 0.1
    cfg.data.resize = cfg.eval_data.resize = "center_crop"
    # Short, and gentle on what the model knows already.
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 300, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-4, 1e-6, 30
    cfg.sample.every, cfg.sample.count = 100, 8
    for name in ("guidance", "guidance_rule", "image_temperature"):
        cfg.sample[name] = found["sample"][name]
    cfg.sample.denoise = False
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 100, 128, 16
    cfg.checkpoint.every = 100
    return cfg
