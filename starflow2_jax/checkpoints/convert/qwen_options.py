"""Convert the `config.json` of Qwen2.5-VL to our configuration and back.

Published files have the language model's fields at the top level; newer versions of transformers
nest them under `text_config`. An absent field has the default of transformers.
"""

from collections.abc import Mapping
from typing import Any

from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig

_MODEL_TYPE = "qwen2_5_vl"
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_KINDS = ("mrope", "default")
# (our name, published name, default)
_TEXT = (
    ("vocab", "vocab_size", 152064),
    ("width", "hidden_size", 8192),
    ("layers", "num_hidden_layers", 80),
    ("heads", "num_attention_heads", 64),
    ("kv_heads", "num_key_value_heads", 8),
    ("mlp_width", "intermediate_size", 29568),
)
_VISION = (
    ("depth", "depth", 32),
    ("width", "hidden_size", 3584),
    ("heads", "num_heads", 16),
    ("mlp_width", "intermediate_size", 3420),
    ("out_width", "out_hidden_size", 3584),
    ("patch", "patch_size", 14),
    ("frames", "temporal_patch_size", 2),
    ("channels", "in_channels", 3),
    ("merge", "spatial_merge_size", 2),
    ("window", "window_size", 112),
)
_TOKENS = (
    ("image_token", "image_token_id", 151655),
    ("video_token", "video_token_id", 151656),
    ("vision_start_token", "vision_start_token_id", 151652),
    ("vision_end_token", "vision_end_token_id", 151653),
)


def read_options(options: Mapping[str, Any], source: str = "config.json") -> QwenConfig:
    """Return our configuration of a `config.json`; `source` names the file in errors."""
    kind = options.get("model_type")
    if kind != _MODEL_TYPE:
        raise ValueError(f"{source}: model_type={kind!r}, expected {_MODEL_TYPE!r}")
    quantized = options.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ValueError(
            f"{source}: the weights are quantized ({method}), which is not supported; take the "
            "model's folder of floating-point weights"
        )
    nested = options.get("text_config")
    text = nested if isinstance(nested, Mapping) else options
    vision = options.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ValueError(f"{source}: vision_config is missing")

    def integers(fields: Mapping[str, Any], prefix: str, table: tuple) -> dict[str, Any]:
        values = {}
        for name, key, default in table:
            values[name] = value = fields.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{source}: {prefix}{key}={value!r} is not a whole number")
        return values

    def activation(fields: Mapping[str, Any], prefix: str) -> str:
        name = fields.get("hidden_act", "silu")
        if name not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"{source}: {prefix}hidden_act={name!r} is not one of {known}")
        return _ACTIVATIONS[name]

    prefix = "" if text is options else "text_config."
    sizes = integers(text, prefix, _TEXT)
    if text.get("use_sliding_window"):
        raise ValueError(f"{source}: {prefix}use_sliding_window=True is not supported")
    head_dim = text.get("head_dim") or sizes["width"] // max(sizes["heads"], 1)
    if head_dim * sizes["heads"] != sizes["width"]:
        raise ValueError(
            f"{source}: {prefix}hidden_size={sizes['width']} is not {sizes['heads']} heads of "
            f"{head_dim}"
        )
    base, sections = _rope(text, source, prefix)
    full = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
    if not isinstance(full, list | tuple) or not all(isinstance(i, int) for i in full):
        raise ValueError(f"{source}: vision_config.fullatt_block_indexes={full!r} is no list")
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial" or rope.get("rope_theta", 10000.0) != 10000.0:
        raise ValueError(f"{source}: vision_config.rope_parameters={rope} is not supported")
    try:
        return QwenConfig(
            **sizes,
            vision=VisionConfig(
                **integers(vision, "vision_config.", _VISION),
                full_layers=tuple(full),
                activation=activation(vision, "vision_config."),
            ),
            sections=sections,
            rope_base=base,
            norm_eps=float(text.get("rms_norm_eps", 1e-5)),
            activation=activation(text, prefix),
            tied=bool(options.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            **integers(options, "", _TOKENS),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from error


def _rope(text: Mapping[str, Any], source: str, prefix: str) -> tuple[float, Any]:
    """Return the base and the M-RoPE sections."""
    key = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"
    rope = text.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KINDS or rope.get("type", kind) not in _ROPE_KINDS:
        raise ValueError(
            f"{source}: {prefix}{key} of type {kind!r} is not one of {', '.join(_ROPE_KINDS)}"
        )
    if rope.get("factor", 1.0) != 1.0:
        raise ValueError(f"{source}: {prefix}{key}.factor={rope['factor']} is not supported")
    sections = tuple(rope.get("mrope_section", (16, 24, 24)))
    return float(rope.get("rope_theta", text.get("rope_theta", 1e6))), sections


def public_options(cfg: QwenConfig) -> dict[str, Any]:
    """Return the `config.json` of `cfg` in the layout of the published files."""
    if cfg.vision is None:
        raise ValueError("vision: the public model has a tower, the configuration has none")
    activations = {name: key for key, name in _ACTIVATIONS.items()}
    vision = {key: getattr(cfg.vision, name) for name, key, _ in _VISION}
    vision |= {
        "model_type": _MODEL_TYPE,
        "hidden_act": activations[cfg.vision.activation],
        "in_chans": cfg.vision.channels,
        "spatial_patch_size": cfg.vision.patch,
        "fullatt_block_indexes": list(cfg.vision.full_layers),
        "tokens_per_second": 2,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": _MODEL_TYPE,
        **{key: getattr(cfg, name) for name, key, _ in (*_TEXT, *_TOKENS)},
        "hidden_act": activations[cfg.activation],
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "rope_scaling": {"type": "mrope", "mrope_section": list(cfg.sections)},
        "tie_word_embeddings": cfg.tied,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 128000,
        "vision_config": vision,
    }
