"""python -m starflow2_jax.train --config experiments/finetune.py --config.data.path=data/mine --workdir runs/mine

Fine-tune STARFlow2 on your own dataset: stage 3 continues from a trained model, which is the shipped
one, or the model folder, workdir, step or address (hf://user/name) after the colon:
    --config experiments/finetune.py:models/starflow2
The model's sizes, VLM, codec, tokenizer, noise and row length are taken from it, but for the noise
of images that are only read: they have none. Images of other sizes are scaled and cropped. Images
are encoded during training (`fae.path`), unless --config.data.latents names latents from
`prepare latents`, which saves that time.
Data: prepare import of the kinds of records that the model should learn (docs/finetuning.md).
--config.eval_data.path=FOLDER gives held-out data for the metrics and the sample grids, whose
prompts come from all over it. 1,200 steps of about 36 captions take half an hour on two cores.
"""  # noqa: E501

from starflow2_jax import config
from starflow2_jax.inference import load

SHIPPED = "pretrained/starflow2_tiny"


def get_config(source: str = SHIPPED):
    """Return the configuration of a training that starts from the model `source`."""
    trained = load.read_config(source)
    cfg = config.default()
    cfg.name, cfg.task = "finetune", "starflow2"
    cfg.model.update(trained["model"])
    for name in ("compute_dtype", "frozen_dtype"):
        cfg[name] = trained[name]
    for group in ("text", "noise", "loss"):
        cfg[group].update(trained[group])
    cfg.noise.context_sigma = 0.0
    cfg.text.images = 0  # A clean copy of a drawn image takes the place of another image.
    cfg.vlm.path, cfg.fae.path = trained["vlm"]["path"], trained["fae"]["path"]
    cfg.init["from"] = source
    cfg.train.trainable = ("adapter", "shallow", "deep", "skip")
    cfg.cfg_dropout.text = 0.1
    cfg.data.resize = cfg.eval_data.resize = "center_crop"
    cfg.data.packing = "mixture"
    # A lower learning rate than in stage 3, to preserve what the model already knows.
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = 16, 1200, 0.99
    cfg.optim.lr, cfg.optim.final_lr, cfg.optim.warmup = 2e-4, 1e-6, 50
    cfg.optim.muon_lr = 0.3 * trained["optim"].get("muon_lr", 0.0)
    cfg.sample.every, cfg.sample.count, cfg.sample.spread = 300, 16, True
    for name in ("guidance", "guidance_rule", "image_temperature"):
        cfg.sample[name] = trained["sample"][name]
    cfg.sample.denoise = False
    cfg.evaluate.every, cfg.evaluate.rows, cfg.evaluate.batch_size = 300, 128, 16
    cfg.checkpoint.every = 150
    return cfg
