"""Convert the run options of ml-tarflow and ml-starflow to a `FlowConfig` and back.

The constructors and the YAML files use two vocabularies. Where they differ, the YAML name is
replaced by the constructor's.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starflow2_jax.config import checks
from starflow2_jax.models.flow import FlowConfig

FAMILIES = ("tarflow", "starflow")

_YAML_NAMES = {"channel_size": "in_channels", "blocks": "num_blocks"}
_STARFLOW_ONLY = {
    *("top_block_channels", "num_heads", "num_kv_heads", "rope", "pt_seq_len", "sos", "txt_size"),
    *("txt_dim", "cond_top_only", "use_softplus", "use_swiglu", "use_bias", "use_qk_norm"),
    *("use_post_norm", "use_final_norm", "hf_style_rope", "norm_type", "soft_clip", "seq_order"),
}
_SHARED = {
    *("img_size", "patch_size", "in_channels", "channels", "num_blocks", "layers_per_block"),
    *("head_dim", "nvp", "num_classes"),
}
_REFUSED = {
    "temporal_causal": "belongs to the video model",
    "learnable_self_denoiser": "belongs to the video model",
    "local_attn_window": "belongs to the video model",
    "shallow_block_local": "belongs to the video model",
    "vid_size": "belongs to the video model",
    "use_pretrained_lm": "puts a pretrained language model in the deep block",
    "use_mm_attn": "puts a pretrained language model in the deep block",
    "model_type": "names one of that code's presets: give its width, blocks and layers instead",
}
_NUMBERS = (_SHARED | _STARFLOW_ONLY) - {"layers_per_block", "norm_type", "seq_order"}
_MAX_NUMBER = 1_000_000
_MAX_BYTES = 1 << 20  # of a file of options
# Pixels along a latent's side, by the name of the autoencoder in the released configurations.
_VAE_FACTORS = {"sd-vae": 8, "sdxl-vae": 8}


def read_options(
    options: Mapping[str, Any] | str | Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the options of a run.

    Args:
        options: a mapping in either vocabulary; `key=value` text; or the path of a file that
            contains such text, or YAML: a mapping, or a list of one-key maps under `arguments`.

    Returns:
        (model options under the constructor's names, with `vae` and `family` if present; the
        trainer's options)
    """
    values = dict(options) if isinstance(options, Mapping) else _parse(options)
    if set(values) == {"arguments"}:
        values = _merge_arguments(values["arguments"])
    known: dict[str, Any] = {}
    trainer_options: dict[str, Any] = {}
    for name, value in values.items():
        name = str(name).lstrip("-")
        key = _YAML_NAMES.get(name, name)
        value = value if key == "norm_type" else _value(value)
        if key in _REFUSED:
            if value not in (None, 0, False, ""):
                raise ValueError(f"options: {name}={value} {_REFUSED[key]}, which is not converted")
        elif key in _SHARED | _STARFLOW_ONLY | {"family", "vae"}:
            if key in known and known[key] != value:
                raise ValueError(f"options: {key} is given twice, {known[key]!r} and {value!r}")
            known[key] = _check_number(name, value) if key in _NUMBERS else value
        else:
            _refuse_misspelt(name)
            trainer_options[name] = value
    if known.get("nvp", 1) in (0, False):
        raise ValueError("options: nvp=0 (a running prior variance) is not converted")
    if known.get("family", FAMILIES[0]) not in FAMILIES:
        raise ValueError(f"options: family={known['family']!r} is not one of {FAMILIES}")
    return known, trainer_options


def _check_number(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool) or checks.is_number(value, 0, _MAX_NUMBER):
        return value
    raise ValueError(
        f"options: {name}={checks.display(value)} is not a number from 0 to {_MAX_NUMBER:,}"
    )


def _merge_arguments(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, Mapping):
        return dict(arguments)
    merged: dict[str, Any] = {}
    for entry in arguments if isinstance(arguments, list) else [arguments]:
        if not isinstance(entry, Mapping):
            raise ValueError(f"options: arguments holds {entry!r}; expected a list of name: value")
        for name, value in entry.items():
            if name in merged and merged[name] != value:
                raise ValueError(f"options: {name} is given twice, {merged[name]!r} and {value!r}")
            merged[name] = value
    return merged


def _parse(source: str | Path) -> dict[str, Any]:
    from starflow2_jax.data import untrusted  # needs msgspec

    text, location = str(source), "options"
    is_text = isinstance(source, str) and ("=" in text or "\n" in text)
    if not is_text or ("\n" not in text and Path(text).is_file()):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(f"options: no file {path} (or write key=value)")
        location = f"options: {path}"
        text = untrusted.decode_text(untrusted.read_file(path, _MAX_BYTES), location)
    if re.match(r"\s*[A-Za-z_]\w*\s*=", text):
        ends = r"(?=[\s,;]+[A-Za-z_]\w*\s*=|\s*$)"
        pairs = re.findall(rf"([A-Za-z_]\w*)\s*=\s*(.*?){ends}", text, re.S)
        return _merge_arguments([{name: value} for name, value in pairs])
    import yaml

    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{location}: neither key=value nor YAML: {reason}") from error
    if not isinstance(parsed, Mapping):
        raise ValueError(f"{location}: expected names and values, got {type(parsed).__name__}")
    return dict(parsed)


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip().strip("'\"")
    words = {"none": None, "null": None, "true": True, "false": False, "": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _refuse_misspelt(name: str) -> None:
    near = difflib.get_close_matches(
        name, [*_SHARED, *_STARFLOW_ONLY, *_YAML_NAMES, *_REFUSED, "family"], 1, 0.85
    )
    # `batch_size` is the only trainer option that is this close to a model option.
    if near and name != "batch_size":
        raise ValueError(f"options: unknown {name!r}; did you mean {near[0]!r}?")


def find_family(options: Mapping[str, Any], names: set[str]) -> str:
    """Return the family of a run, `tarflow` or `starflow`, from its options and tensor names.

    The option `family` decides if it is present. Otherwise class vectors mean TarFlow, and an
    option or a tensor that only STARFlow has means STARFlow. Without any of these it is TarFlow;
    then the two differ only in the order of numbers within a patch.
    """
    if options.get("family"):
        return options["family"]
    endings = {name.split(".", 2)[-1] for name in names}
    if "class_embed" in endings or options.get("num_classes"):
        return "tarflow"
    starflow_tensors = {"sos_embed", "proj_txt.weight", "final_norm.weight"} & endings
    if starflow_tensors or "feat_rope.freqs_cos" in names or _STARFLOW_ONLY & set(options):
        return "starflow"
    return "tarflow"


def image_config(options: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return `pixels`, `patch` and `channel_order` of the image (or latent) cut into tokens.

    `pixels` is the side of the flow's input, which with a VAE is the latent. `channel_order` is the
    order within a token, as in `models.patches`.
    """
    pixels, patch = _required(options, "img_size"), _integer(options, "patch_size", 4)
    vae = options.get("vae")
    if vae:
        factor = next((f for name, f in _VAE_FACTORS.items() if name in str(vae)), None)
        if factor is None:
            raise ValueError(
                f"options: vae={vae!r} is not known, so the latent's side does not follow from "
                f"img_size={pixels}; leave vae out and give img_size as the latent's side"
            )
        pixels = _divide(pixels, factor, "img_size", f"the factor {factor} of {vae}")
    _divide(pixels, patch, "img_size", "patch_size")
    channel_order = "channel_first" if family == "tarflow" else "channel_last"
    return {"pixels": pixels, "patch": patch, "channel_order": channel_order}


def flow_config(
    options: Mapping[str, Any], family: str, shapes: Mapping[str, tuple[int, ...]]
) -> FlowConfig:
    """Return the flow that options describe.

    The number of classes and of text channels, which a run takes from its data or text encoder, are
    read from the `shapes` of the state dict's tensors if the options lack them.
    """
    image = image_config(options, family)
    sizes = dict(
        channels=_required(options, "in_channels") * image["patch"] ** 2,
        width=_required(options, "channels"),
        layers=_layers(options),
        head_dim=_integer(options, "head_dim", 64),
    )
    to_config = _tarflow_config if family == "tarflow" else _starflow_config
    return to_config(options, shapes, image["pixels"] // image["patch"], sizes)


def _tarflow_config(
    options: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    side: int,
    sizes: Mapping[str, Any],
) -> FlowConfig:
    # These values of STARFlow's options are what TarFlow does.
    neutral = {"use_bias": 1, "norm_type": "layer_norm", "seq_order": "R2L"}
    foreign = [n for n in sorted(_STARFLOW_ONLY) if options.get(n, 0) != neutral.get(n, 0)]
    foreign = [n for n in foreign if options.get(n) is not None]
    if foreign:
        raise ValueError(f"options: TarFlow has no {', '.join(foreign)}")
    return FlowConfig(
        side=side,
        start="shift",
        positions="learned",
        scale="exp",
        classes=_integer(options, "num_classes", _size(shapes, "class_embed", 0)),
        **sizes,
    )


def _starflow_config(
    options: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    side: int,
    sizes: Mapping[str, Any],
) -> FlowConfig:
    if options.get("num_classes"):
        raise ValueError("options: num_classes: STARFlow has no class vectors, only text")
    rope = bool(options.get("rope"))
    text_length = _integer(options, "txt_size", 0)
    norm = options.get("norm_type") or "layer_norm"
    if norm not in ("layer_norm", "rms_norm"):
        raise ValueError(f"options: norm_type={norm!r} is not one of layer_norm, rms_norm")
    if options.get("cond_top_only") and not text_length:
        raise ValueError("options: cond_top_only needs txt_size")
    text_channels = _integer(options, "txt_dim", _size(shapes, "proj_txt.weight", 1))
    if text_length and not text_channels:
        raise ValueError("options: txt_size without txt_dim, and the file has no proj_txt")
    return FlowConfig(
        side=_integer(options, "pt_seq_len", side) if rope else side,
        deep_width=options.get("top_block_channels") or None,
        heads=options.get("num_heads") or None,
        kv_heads=options.get("num_kv_heads") or None,
        start="token" if options.get("sos") else "shift",
        order=options.get("seq_order") or "R2L",
        positions="rope" if rope else "learned",
        rope_pairs="half" if options.get("hf_style_rope") else "interleaved",
        scale="softplus" if options.get("use_softplus") else "exp",
        soft_clip=float(options.get("soft_clip") or 0.0),
        final_norm=bool(options.get("use_final_norm")),
        text_channels=text_channels if text_length else 0,
        text_length=text_length,
        text_blocks="all" if text_length and not options.get("cond_top_only") else "deep",
        norm=norm,
        bias=bool(1 if options.get("use_bias") is None else options["use_bias"]),
        qk_norm=bool(options.get("use_qk_norm")),
        post_norm=bool(options.get("use_post_norm")),
        gated_mlp=bool(options.get("use_swiglu")),
        **sizes,
    )


def public_options(cfg: FlowConfig, image: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the constructor's options of a flow: the inverse of `flow_config`.

    `image` is that of `image_config`; by default patches of one pixel in STARFlow's order.
    """
    image = dict(image or {})
    patch = int(image.get("patch", 1))
    if cfg.start == "prefix" or cfg.mlp_ratio != 4:
        raise ValueError(
            f"model.start={cfg.start!r}, model.mlp_ratio={cfg.mlp_ratio}: "
            "neither published code has one of them"
        )
    if (cfg.rope_frequencies, cfg.key_positions) != ("released", "next"):
        raise ValueError(
            f"model.rope_frequencies={cfg.rope_frequencies!r}, model.key_positions="
            f"{cfg.key_positions!r}: the published code has 'released' and 'next' alone"
        )
    rope = cfg.positions == "rope"
    options: dict[str, Any] = dict(
        img_size=int(image.get("pixels", cfg.side * patch)),
        patch_size=patch,
        in_channels=_divide(cfg.channels, patch**2, "model.channels", "the patch area"),
        channels=cfg.width,
        num_blocks=len(cfg.layers),
        layers_per_block=list(cfg.layers),
        nvp=1,
    )
    channel_order = image.get("channel_order") or (
        "channel_first" if cfg.classes else "channel_last"
    )
    if channel_order == "channel_first" or cfg.classes:
        options.update(
            layers_per_block=cfg.layers[0], num_classes=cfg.classes, head_dim=cfg.head_dim
        )
        if channel_order != "channel_first" or not _is_tarflow(cfg, options):
            raise ValueError(
                "TarFlow's options cannot express this flow: classes and channel-first patches "
                "require start='shift', learned positions, scale='exp' and equal blocks"
            )
        if cfg.head_dim == 64:
            del options["head_dim"]
        return options
    options.update(
        head_dim=cfg.head_dim,
        rope=int(rope),
        sos=int(cfg.start == "token"),
        txt_size=cfg.text_length,
        txt_dim=cfg.text_channels,
        cond_top_only=int(cfg.text_blocks == "deep" and cfg.text_length > 0),
        use_softplus=int(cfg.scale == "softplus"),
        use_swiglu=int(cfg.gated_mlp),
        use_bias=int(cfg.bias),
        use_qk_norm=int(cfg.qk_norm),
        use_post_norm=int(cfg.post_norm),
        use_final_norm=int(cfg.final_norm),
        hf_style_rope=int(cfg.rope_pairs == "half"),
        norm_type=cfg.norm,
        soft_clip=cfg.soft_clip,
        seq_order=cfg.order,
    )
    for name, value in (
        ("top_block_channels", cfg.deep_width),
        ("num_heads", cfg.heads),
        ("num_kv_heads", cfg.kv_heads),
        ("pt_seq_len", cfg.side if rope else None),
    ):
        if value is not None:
            options[name] = value
    return options


def to_yaml(options: Mapping[str, Any]) -> str:
    """Return the options of `public_options` in the format of the published YAML files."""
    yaml_names = {constructor: name for name, constructor in _YAML_NAMES.items()}
    lines = ["arguments:"]
    for name, value in options.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"- {yaml_names.get(name, name)}: {text}")
    return "\n".join(lines) + "\n"


def _is_tarflow(cfg: FlowConfig, options: Mapping[str, Any]) -> bool:
    """Return True if TarFlow's `options` describe `cfg`, up to how it is computed."""
    described = flow_config(options, "tarflow", {})
    computation = {key: getattr(cfg, key) for key in ("compute_dtype", "remat", "attention")}
    return dataclasses.replace(described, **computation) == cfg


def _layers(options: Mapping[str, Any]) -> tuple[int, ...]:
    value, blocks = options.get("layers_per_block"), options.get("num_blocks")
    if value is None:
        raise ValueError("options: layers_per_block is missing")
    parts = re.split(r"[\s,]+", value.strip("[]() ")) if isinstance(value, str) else value
    try:
        layers = [int(n) for n in (parts if isinstance(parts, (list, tuple)) else [parts])]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"options: layers_per_block={value!r} is not whole numbers") from None
    if len(layers) == 1:
        layers *= _required(options, "num_blocks")
    elif blocks is not None and blocks != len(layers):
        raise ValueError(f"options: num_blocks={blocks}, but layers_per_block has {len(layers)}")
    if min(layers) < 0 or layers[-1] == 0:
        raise ValueError(f"options: layers_per_block={layers}: the last block has at least 1 layer")
    return tuple(layers)


def _required(options: Mapping[str, Any], name: str) -> int:
    if options.get(name) is None:
        raise ValueError(f"options: {name} is missing")
    return _integer(options, name, 0)


def _integer(options: Mapping[str, Any], name: str, default: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, str) or not math.isfinite(value) or int(value) != value or value < 0:
        raise ValueError(f"options: {name}={value!r} is not a whole number")
    return int(value)


def _size(shapes: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> int:
    sizes = [s[axis] for n, s in shapes.items() if n.endswith("." + ending) and len(s) > axis]
    return sizes[0] if sizes else 0


def _divide(total: int, divisor: int, name: str, divisor_name: str) -> int:
    if divisor < 1 or total % divisor:
        raise ValueError(f"options: {name}={total} is not a multiple of {divisor_name} ({divisor})")
    return total // divisor
