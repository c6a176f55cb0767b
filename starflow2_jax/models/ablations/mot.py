"""A mixture of transformers with a flow as its generation expert: the Pretzel's rival (ablation).

As in BAGEL (paper.md 7), every layer has two sets of weights and one attention over the whole row:
the VLM's own for text, the expert's for images. The expert predicts u, patch by patch, from shallow
blocks like the Pretzel's; the text reads images through the expert's keys and values, and there is
no adapter and no skip. Frozen, the VLM is read and not changed; trained jointly, all weights are.

What the rival is given so that it is not weaker by its set-up: the expert may have another width
than the VLM (attention needs equal heads only), so that both models train equally many weights; it
reads `<|vision_start|>`, too, which predicts the first patch, as a vector of its own (BAGEL's
expert predicts a patch where it stands, so its delimiters can be text); and each of its inputs is
told the place of the patch it predicts.

Axes: B rows, T positions, D latent channels, N patches, V width of the VLM, C of the expert.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from starflow2_jax.models import flow, layers, qwen, starflow2 as pretzel
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.layers import KVCache, LayerConfig, linear
from starflow2_jax.params import ParamSpec, Tree, normal, zeros


@dataclass(frozen=True)
class Config:
    """The VLM, the shallow flow, and the expert's sizes.

    Attributes:
        flow: the shallow blocks as the Pretzel has them, and a deep block of no layers in whose
            place the expert stands (see `starflow2.flow_config`).
        width, mlp_width: C, and hidden channels of the expert's MLPs; its heads and the number of
            its layers are the VLM's.
    """

    vlm: qwen.Config
    flow: FlowConfig
    width: int
    mlp_width: int

    def __post_init__(self):
        object.__setattr__(self, "vlm", dataclasses.replace(self.vlm, vision=None))
        if self.flow.layers[-1]:
            raise ValueError(
                f"model.flow.layers={self.flow.layers}: a mixture of transformers has no deep "
                f"block; the last number must be 0"
            )
        if self.flow.positions != "rope" or self.flow.classes:
            raise ValueError("model.flow: expected positions='rope' and classes=0")

    @property
    def layer(self) -> LayerConfig:
        """One layer of the expert."""
        sizes = {"width": self.width, "mlp_width": self.mlp_width}
        return dataclasses.replace(self.vlm.layer, **sizes)

    @property
    def deep(self) -> flow.BlockConfig:
        """Options of the expert's head."""
        return self.flow.block(-1)

    @property
    def patches(self) -> int:
        """N."""
        return self.flow.tokens

    @property
    def skips(self) -> tuple[str, ...]:
        """None; as the Pretzel's."""
        return ()


def beside(cfg: pretzel.Config, width: int) -> Config:
    """The mixture that stands beside a Pretzel: its VLM and shallow blocks, an expert of `width`
    whose MLPs are as many times wider as the VLM's, in steps of eight."""
    shallow = dataclasses.replace(cfg.flow, layers=(*cfg.flow.layers[:-1], 0))
    mlp = 8 * round(width * cfg.vlm.mlp_width / cfg.vlm.width / 8)
    return Config(cfg.vlm, shallow, width, mlp)


# The experts' widths at which as many weights are trained as by the Pretzel of that name.
WIDTHS = {"tiny": 192, "small": 400, "paper": 2240}


def preset(name: str) -> Config:
    """What stands beside the Pretzel of that name (`beside`).

    Raises:
        ValueError: an unknown name.
    """
    return beside(pretzel.preset(name), WIDTHS[name])


def options(cfg: Config) -> dict[str, Any]:
    """An experiment's `model` group (see `starflow2.options`), marked as a mixture's."""
    group: dict[str, Any] = {"kind": "mot", **dataclasses.asdict(cfg)}
    for name in ("order", "text_channels", "text_length", "compute_dtype"):
        del group["flow"][name]
    del group["vlm"]["vision"], group["vlm"]["compute_dtype"]
    return group


def declare(cfg: Config) -> dict[str, Any]:
    """Every weight, in the subtrees `vlm`, `shallow`, and `deep`, which is the expert."""
    latent, width = cfg.flow.channels, cfg.width
    expert: dict[str, Any] = {
        "proj_in": {
            "weight": ParamSpec((latent, width), (None, "embed")),
            "bias": ParamSpec((width,), ("embed",), zeros),
        },
        "start": ParamSpec((width,), ("embed",), normal(1.0)),
        "place": ParamSpec((cfg.patches, width), (None, "embed"), normal(1e-2)),
        "layers": layers.declare(cfg.layer, cfg.vlm.layers),
        "proj_out": {
            "weight": ParamSpec((width, 2 * latent), ("embed", None), zeros),
            "bias": ParamSpec((2 * latent,), (None,), zeros),
        },
    }
    if cfg.flow.final_norm:
        expert["final_norm"] = {"weight": ParamSpec((width,), ("embed",), zeros)}
    shallow = flow.declare(cfg.flow)["blocks"]
    return {"vlm": qwen.declare(cfg.vlm), "shallow": shallow, "deep": expert}


def states(
    params: Tree,
    text: jax.Array,
    u: jax.Array,
    begins: jax.Array,
    is_image: jax.Array,
    positions: Any,
    following: jax.Array,
    mask: jax.Array | None,
    cfg: Config,
    *,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
    heat: Any = 1.0,
) -> tuple[jax.Array, jax.Array, KVCache | None]:
    """The VLM's states y [B, T, V], of text, after its final norm; the expert's h [B, T, C], of
    begins and patches, before its own; and the cache where one was given.

    Args:
        params: with a cache the layers of both must be unstacked (`unstack`).
        text: token embeddings [B, T, V]; u: [B, T, D] as `starflow2.place` gives it.
        begins, is_image: bool [B, T], where `<|vision_start|>` and patches stand.
        positions: the VLM's [B, T, 3], for both; following: int [B, T, 3] (row, column, k) of the
            items to predict; mask, segments, heat: as in `layers.attention`, heat its temperature.
    """
    deep = params["deep"]
    drawn = begins | is_image
    h = linear(deep["proj_in"], u.astype(text.dtype))
    h = jnp.where(is_image[..., None], h, deep["start"].astype(h.dtype))
    number = following[..., 0] * cfg.flow.side + following[..., 1]
    h = h + deep["place"].astype(h.dtype)[number]
    tables = qwen.tables(positions, cfg.vlm, jnp.promote_types(text.dtype, jnp.float32))
    own, g = params["vlm"]["layers"], text

    def layer(g, h, weights, cached=None):
        mine, theirs = weights
        ours = layers.queries_keys_values(mine, g, cfg.vlm.layer, tables)
        others = layers.queries_keys_values(theirs, h, cfg.layer, tables)
        at = drawn[:, None, :, None]
        each = (jnp.where(at, b, a) for a, b in zip(ours, others))
        mixed, held = layers.mix(*each, cfg.vlm.layer, mask, heat, cached, segments)
        g = layers.after_attention(mine, g, mixed, cfg.vlm.layer)
        return g, layers.after_attention(theirs, h, mixed, cfg.layer), held

    if cache is None:

        def body(carry, weights):
            return layer(*carry, weights)[:2], None

        policy = layers.REMAT[cfg.vlm.remat]
        if policy is not None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        unroll = layers.CPU_UNROLL if layers.platform() == "cpu" else 1
        g, h = jax.lax.scan(body, (g, h), (own, deep["layers"]), unroll=unroll)[0]
        return qwen.final_norm(params["vlm"], g, cfg.vlm), h, None
    keys, values = [], []
    for weights, k, v in zip(zip(own, deep["layers"]), cache.keys, cache.values):
        g, h, (k, v) = layer(g, h, weights, (k, v, cache.length))
        keys.append(k)
        values.append(v)
    cache = KVCache(tuple(keys), tuple(values), cache.length + g.shape[1])
    return qwen.final_norm(params["vlm"], g, cfg.vlm), h, cache


def unstack(params: Tree, cfg: Config) -> dict[str, Any]:
    """params with the layers of the VLM and the expert unstacked, as cached steps take them."""
    cut = lambda tree: {**tree, "layers": layers.unstack(tree["layers"], cfg.vlm.layers)}
    return {**params, "vlm": cut(params["vlm"]), "deep": cut(params["deep"])}
