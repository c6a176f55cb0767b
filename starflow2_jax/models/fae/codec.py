"""The latent codec FAE (arXiv 2512.07829): features of a frozen teacher to few channels and back.

    features --encoder--> latents --feature decoder--> features --pixel decoder--> image

The codec does not depend on the teacher: it encodes features [B, T, C]. Latents outside this file
are normalized: every channel has zero mean and unit variance over a dataset, by the statistics in
the subtree `latent` (zeros and ones until they are measured). Their slowest spatial frequencies may
be amplified, see `normalize`.

Shapes: B batch, T patches in raster order, C feature channels, D latent channels, H x W pixels.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.mesh import constrain
from starflow2_jax.models import layers, rope
from starflow2_jax.models.attention import grouped_query_attention
from starflow2_jax.models.layers import LayerConfig, at_least_float32, linear
from starflow2_jax.models.patches import unpatchify
from starflow2_jax.params import ParamSpec, Tree, normal, ones, zeros

# A variance beyond these is zero or infinite in practice, and its exponential overflows.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
_ACTIVATIONS = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "silu": jax.nn.silu}


@dataclass(frozen=True)
class FAEConfig:
    """Sizes of the encoder, the feature decoder and the pixel decoder."""

    feature_width: int
    side: int  # rows (= columns) of the grid of patches
    latent: int  # D
    encoder_heads: int
    encoder_head_dim: int
    decoder_layers: int
    decoder_heads: int
    decoder_head_dim: int
    decoder_mlp: int  # hidden channels of the SwiGLUs: 8/3 of the width, in steps of eight
    pixel_layers: int
    pixel_width: int
    pixel_heads: int
    pixel_mlp: int
    patch: int  # side in pixels of the square that one token decodes to
    activation: str = "gelu"  # of the encoder, `gelu` or `silu`; the paper does not name it
    # Standard deviation of the noise on the features from which the pixel decoder learns, for
    # DINOv2; other teachers scale it by the norm of their features
    noise: float = 0.4
    # Factor of the `gain_frequencies` slowest frequencies per axis of normalized latents
    frequency_gain: float = 1.0
    gain_frequencies: int = 1  # 1 is the mean over all tokens
    compute_dtype: str | None = None  # dtype of matmuls; None is that of the parameters
    remat: str = "none"  # a name in `layers.REMAT`

    def __post_init__(self):
        for field, allowed in (("activation", _ACTIVATIONS), ("remat", layers.REMAT)):
            if getattr(self, field) not in allowed:
                value = getattr(self, field)
                raise ValueError(f"fae: {field}={value!r} is not one of {tuple(allowed)}")
        if self.pixel_width % self.pixel_heads:
            raise ValueError(
                f"fae: pixel_width={self.pixel_width} is not a multiple of "
                f"pixel_heads={self.pixel_heads}"
            )
        if self.decoder_head_dim % 4:
            raise ValueError(
                f"fae: decoder_head_dim={self.decoder_head_dim} is not a multiple of 4, so rows "
                "and columns cannot share its RoPE pairs"
            )
        if not self.frequency_gain > 0:
            raise ValueError(f"fae: frequency_gain={self.frequency_gain} is not above zero")
        if not 1 <= self.gain_frequencies <= self.side:
            raise ValueError(
                f"fae: gain_frequencies={self.gain_frequencies} is not from 1 to side={self.side}"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return self.side**2

    @property
    def pixels(self) -> int:
        """Side H (= W) of the decoded image."""
        return self.side * self.patch

    @property
    def decoder_layer(self) -> LayerConfig:
        """A layer of the feature decoder."""
        return LayerConfig(
            width=self.feature_width,
            heads=self.decoder_heads,
            kv_heads=self.decoder_heads,
            head_dim=self.decoder_head_dim,
            mlp_width=self.decoder_mlp,
            norm="rms_norm",
            norm_eps=1e-6,
            activation="silu",
            gated=True,
        )

    @property
    def pixel_layer(self) -> LayerConfig:
        """A layer of the pixel decoder.

        The paper names neither MLP nor norm. With a SwiGLU and LayerNorms the module has the
        paper's 305.36 M parameters, with a plain MLP 304.93 M.
        """
        return LayerConfig(
            width=self.pixel_width,
            heads=self.pixel_heads,
            kv_heads=self.pixel_heads,
            head_dim=self.pixel_width // self.pixel_heads,
            mlp_width=self.pixel_mlp,
            norm="layer_norm",
            norm_eps=1e-6,
            activation="silu",
            gated=True,
        )


PRESETS = {
    # DINOv2-g/14 on 224 pixels, images of 256.
    "paper": FAEConfig(
        feature_width=1536,
        side=16,
        latent=32,
        encoder_heads=24,
        encoder_head_dim=256,
        decoder_layers=6,
        decoder_heads=24,
        decoder_head_dim=64,
        decoder_mlp=4096,
        pixel_layers=24,
        pixel_width=1024,
        pixel_heads=16,
        pixel_mlp=2736,
        patch=16,
    ),
    # Images of 64 pixels, for a CPU.
    "tiny": FAEConfig(
        feature_width=128,
        side=8,
        latent=16,
        encoder_heads=4,
        encoder_head_dim=64,
        decoder_layers=2,
        decoder_heads=4,
        decoder_head_dim=32,
        decoder_mlp=344,
        pixel_layers=4,
        pixel_width=128,
        pixel_heads=4,
        pixel_mlp=344,
        patch=8,
    ),
}


def preset(name: str, **changes: Any) -> FAEConfig:
    """Return the preset `paper` or `tiny`, with changes."""
    if name not in PRESETS:
        raise ValueError(f"fae: preset {name!r} is not one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def declare(cfg: FAEConfig) -> dict[str, Any]:
    """Declare the subtrees `encoder`, `feature_decoder`, `pixel_decoder` and `latent`.

    At paper size the first three have 38,166,592, 170,428,416 and 305,360,896 parameters.
    """
    inner = cfg.encoder_heads * cfg.encoder_head_dim
    width, pixel = cfg.feature_width, cfg.pixel_width
    names = ("query", "key", "value", "parallel")
    return {
        "encoder": {
            **{name: layers.declare_linear(width, inner, ("embed", "heads")) for name in names},
            "head": layers.declare_linear(inner, 2 * cfg.latent, ("heads", None)),
        },
        "feature_decoder": {
            "proj_in": layers.declare_linear(cfg.latent, width, (None, "embed")),
            "position": ParamSpec((cfg.tokens, width), (None, "embed"), normal(1e-2)),
            "layers": layers.declare(cfg.decoder_layer, cfg.decoder_layers),
            "final_norm": layers.declare_norm("rms_norm", (width,), ("embed",)),
        },
        "pixel_decoder": {
            "proj_in": layers.declare_linear(width, pixel, (None, "embed")),
            "position": ParamSpec((cfg.tokens, pixel), (None, "embed"), normal(1e-2)),
            "layers": layers.declare(cfg.pixel_layer, cfg.pixel_layers),
            "final_norm": layers.declare_norm("layer_norm", (pixel,), ("embed",)),
            "proj_out": layers.declare_linear(pixel, 3 * cfg.patch**2, ("embed", None)),
        },
        "latent": {
            "mean": ParamSpec((cfg.latent,), (None,), zeros),
            "std": ParamSpec((cfg.latent,), (None,), ones),
        },
    }


def _compute_dtype(params: Tree, cfg: FAEConfig) -> Any:
    weight = next(iter(jax.tree.leaves(params)))
    return jnp.dtype(cfg.compute_dtype or weight.dtype)


def posterior(params: Tree, features: jax.Array, cfg: FAEConfig) -> tuple[jax.Array, jax.Array]:
    """Return mean and log-variance [B, T, D] before normalization, in at least float32.

    They are head(act(attention(x) + W_parallel x)) of features x [B, T, C]; T is arbitrary.
    """
    if features.shape[-1] != cfg.feature_width:
        raise ValueError(
            f"fae: features have {features.shape[-1]} channels, expected {cfg.feature_width}"
        )
    encoder = params["encoder"]
    x = constrain(features.astype(_compute_dtype(encoder, cfg)), "batch", "length")

    def heads(name):
        y = linear(encoder[name], x)
        y = y.reshape(*x.shape[:2], cfg.encoder_heads, cfg.encoder_head_dim)
        return constrain(y.swapaxes(1, 2), "batch", "heads", "length")

    attended = grouped_query_attention(
        heads("query"), heads("key"), heads("value"), layers.ATTEND_ALL
    )
    attended = attended.swapaxes(1, 2).reshape(*x.shape[:2], -1)
    h = _ACTIVATIONS[cfg.activation](attended + linear(encoder["parallel"], x))
    mean, log_variance = jnp.split(at_least_float32(linear(encoder["head"], h)), 2, -1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def encode(params: Tree, features: jax.Array, cfg: FAEConfig) -> tuple[jax.Array, jax.Array]:
    """Return mean and log-variance [B, T, D] of the normalized latents of features [B, T, C].

    The mean's slowest frequencies are amplified. The log-variance leaves that out: it is the
    variance per token of noise that is added to the amplified mean.
    """
    mean, log_variance = posterior(params, features, cfg)
    return normalize(params, mean, cfg), log_variance - 2 * jnp.log(params["latent"]["std"])


def sample(keys: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Sample mean + exp(log_variance / 2) noise, with one key per row [B]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * log_variance) * noise


def normalize(params: Tree, latents: jax.Array, cfg: FAEConfig) -> jax.Array:
    """Scale raw latents [B, T, D] to zero mean and unit variance per channel.

    Then scale their slowest spatial frequencies by `frequency_gain`: with P the projection on the
    products of the n = `gain_frequencies` slowest cosines per axis (DCT-II) and g the gain, z
    becomes z + (g - 1) P z. A flow draws tokens one after another, each from a Gaussian. If the
    latents of empty ground do not depend on the objects elsewhere, that an object begins is an
    event of two outcomes, which no Gaussian draws. The amplified frequencies tell every token
    roughly what the image holds and where. The noise that is added to latents stays as it is, so
    that `denormalize` loses nothing.
    """
    latents = (latents - params["latent"]["mean"]) / params["latent"]["std"]
    return _scale_frequencies(latents, cfg, cfg.frequency_gain)


def denormalize(params: Tree, latents: jax.Array, cfg: FAEConfig) -> jax.Array:
    """Invert `normalize`."""
    latents = _scale_frequencies(latents, cfg, 1 / cfg.frequency_gain)
    return latents * params["latent"]["std"] + params["latent"]["mean"]


def _scale_frequencies(latents: jax.Array, cfg: FAEConfig, gain: float) -> jax.Array:
    if gain == 1:
        return latents
    cosines = np.cos(
        np.pi / cfg.side * np.outer(np.arange(cfg.gain_frequencies), np.arange(cfg.side) + 0.5)
    )
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    waves = jnp.asarray(np.kron(cosines, cosines), latents.dtype)  # [n^2, T], orthonormal rows
    amplitudes = jnp.einsum("kt,btd->bkd", waves, latents, precision="highest")
    return latents + (gain - 1) * jnp.einsum("kt,bkd->btd", waves, amplitudes, precision="highest")


def moments(mean: jax.Array, log_variance: jax.Array) -> dict[str, jax.Array]:
    """Return `count`, and the expected `sum` and sum of `square`s [D] of `posterior`'s latents."""
    square = jnp.square(mean) + jnp.exp(log_variance)
    count = jnp.asarray(mean.shape[0] * mean.shape[1], mean.dtype)
    return {"count": count, "sum": mean.sum((0, 1)), "square": square.sum((0, 1))}


def _embed(params: Tree, x: jax.Array, cfg: FAEConfig) -> jax.Array:
    if x.shape[1] != cfg.tokens:
        raise ValueError(f"fae: {x.shape[1]} tokens, expected {cfg.side} x {cfg.side}")
    h = linear(params["proj_in"], x.astype(_compute_dtype(params, cfg)))
    return h + params["position"].astype(h.dtype)


def decode_features(params: Tree, latents: jax.Array, cfg: FAEConfig) -> jax.Array:
    """Decode normalized latents [B, T, D] to features [B, T, C] in at least float32."""
    decoder = params["feature_decoder"]
    h = _embed(decoder, denormalize(params, latents, cfg), cfg)
    plane = rope.plane((cfg.side, cfg.side), cfg.side)
    angles = rope.angles(plane, cfg.decoder_head_dim)
    tables = rope.tables(angles, jnp.promote_types(h.dtype, jnp.float32))
    h, _ = layers.apply_layers(
        decoder["layers"], h, cfg.decoder_layer, tables, layers.ATTEND_ALL, remat=cfg.remat
    )
    return at_least_float32(layers.rms_norm(decoder["final_norm"], h, offset=False))


def decode_pixels(params: Tree, features: jax.Array, cfg: FAEConfig) -> jax.Array:
    """Decode features [B, T, C] to images [B, H, W, 3] in [-1, 1], unclipped, at least float32."""
    decoder = params["pixel_decoder"]
    h = _embed(decoder, features, cfg)
    h, _ = layers.apply_layers(
        decoder["layers"], h, cfg.pixel_layer, None, layers.ATTEND_ALL, remat=cfg.remat
    )
    h = layers.layer_norm(decoder["final_norm"], h, cfg.pixel_layer.norm_eps)
    out = at_least_float32(linear(decoder["proj_out"], h))
    return unpatchify(out, (cfg.side, cfg.side), cfg.patch, "channel_last")
