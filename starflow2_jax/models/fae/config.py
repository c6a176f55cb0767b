"""The latent codec of a configuration, and the declared parameters of its training tasks.

`fae_features` trains the encoder and the feature decoder; `fae_pixels` trains the pixel decoder
against a discriminator; `fae_end_to_end` trains all of them together on pixels.
"""

from collections.abc import Mapping
from typing import Any

from starflow2_jax import config
from starflow2_jax.models.fae import codec, discriminator, teacher as teachers
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.discriminator import DiscriminatorConfig
from starflow2_jax.models.fae.teacher import Teacher
from starflow2_jax.params import ParamSpec, zeros


def model_config(cfg: Mapping[str, Any]) -> FAEConfig:
    """Return the codec of an experiment."""
    group = config.subgroup(cfg, "model", "")
    if cfg["compute_dtype"] != "float32":
        group["compute_dtype"] = cfg["compute_dtype"]
    model = config.build(FAEConfig, group, "model")
    if cfg["image"]["pixels"] != model.pixels:
        raise ValueError(
            f"config: image.pixels={cfg['image']['pixels']} is not model.side={model.side} x "
            f"model.patch={model.patch}"
        )
    return model


def discriminator_config(cfg: Mapping[str, Any], model: FAEConfig) -> DiscriminatorConfig:
    """Return the discriminator of an experiment."""
    group = cfg["fae"]
    return DiscriminatorConfig(
        widths=tuple(group["discriminator_widths"]),
        groups=group["discriminator_groups"],
        compute_dtype=model.compute_dtype,
    )


def declare_features_training(model: FAEConfig) -> dict[str, Any]:
    """Declare the subtrees in the state of a `fae_features` training."""
    tree = codec.declare(model)
    return {name: tree[name] for name in ("encoder", "feature_decoder", "latent")}


def declare_pixels_training(cfg: Mapping[str, Any], model: FAEConfig) -> dict[str, Any]:
    """Declare the subtrees in the state of a `fae_pixels` training."""
    scalar = ParamSpec((), (), zeros)
    return {
        "pixel_decoder": codec.declare(model)["pixel_decoder"],
        "discriminator": discriminator.declare(discriminator_config(cfg, model)),
        "lecam": {"real": scalar, "fake": scalar},
    }


def declare_end_to_end_training(
    cfg: Mapping[str, Any], model: FAEConfig, teacher: Teacher
) -> dict[str, Any]:
    """Declare the subtrees in the state of a `fae_end_to_end` training.

    They are those of the codec, and the tower `teacher` if `train.trainable` names it.
    """
    tree = codec.declare(model)
    if "teacher" in cfg["train"]["trainable"]:
        tree["teacher"] = teachers.declare(teacher)
    return tree
