"""Published state dicts are read with either vocabulary of options, and written back."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import logging
from helpers.paths import GOLDEN

from starflow2_jax.checkpoints.convert import starflow, starflow_options, tensor_map
from starflow2_jax.models import flow
from starflow2_jax.params import _map, count as count_params, flatten

pytestmark = pytest.mark.fast

TARFLOW = dict(
    in_channels=3,
    img_size=16,
    patch_size=4,
    channels=64,
    num_blocks=4,
    layers_per_block=2,
    nvp=True,
    num_classes=5,
)
STARFLOW = dict(
    in_channels=4,
    img_size=8,
    patch_size=1,
    channels=64,
    num_blocks=4,
    layers_per_block=[2, 2, 2, 4],
    head_dim=32,
    rope=1,
    sos=1,
    txt_size=8,
    txt_dim=24,
    cond_top_only=1,
    use_softplus=1,
    use_final_norm=1,
    soft_clip=4,
    seq_order="L2R",
)
# Gated MLP, RMSNorm, q/k norm, post norm, GQA, half-split RoPE, text everywhere, an empty block.
OTHERS = dict(
    in_channels=3,
    img_size=8,
    patch_size=2,
    channels=48,
    top_block_channels=64,
    num_blocks=3,
    layers_per_block="1 0 2",
    head_dim=32,
    num_heads=4,
    num_kv_heads=2,
    rope=1,
    sos=1,
    txt_size=6,
    txt_dim=20,
    use_softplus=1,
    use_swiglu=1,
    use_bias=0,
    use_qk_norm=1,
    use_post_norm=1,
    use_final_norm=1,
    hf_style_rope=1,
    norm_type="rms_norm",
)
RELEASED_YAML = """\
arguments:
- no_flip: 1
- fsdp: 1
- img_size: 256
- txt_size: 128
- channel_size: 4
- patch_size: 1
- channels: 3072
- blocks: 6
- layers_per_block: 2 2 2 2 2 24
- noise_std: 0.3
- batch_size: 1024
- lr: 6.4e-05
- nvp: 1
- rope: 1
- adaln: 0
- sos: 1
- seq_order: L2R
- use_softplus: 1
- cond_top_only: 1
- use_final_norm: 1
- vae: stabilityai/sd-vae-ft-ema
- text: google/flan-t5-xl
- cfg: 2.5
- soft_clip: 4
"""


@functools.cache
def _golden(name):
    with np.load(GOLDEN / f"{name}_tiny.npz") as arrays:
        params = {k: arrays[k] for k in arrays.files if k.startswith("params/")}
    return {name.removeprefix("params/"): array for name, array in params.items()}


def golden(name):
    return dict(_golden(name))


def synthetic(options, dtype=np.float32):
    """Return a random state dict of `options`, and its configuration."""
    model_options = starflow_options.read_options(options)[0]
    family = starflow_options.find_family(model_options, set())
    cfg = starflow_options.flow_config(model_options, family, {})
    rng = np.random.default_rng(0)
    shapes = tensor_map.published_shapes(starflow.table(cfg))
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}, cfg


@pytest.mark.parametrize(("name", "options"), [("tarflow", TARFLOW), ("starflow", STARFLOW)])
def test_golden_state_dicts_come_back_bit_for_bit(name, options):
    state = golden(name)
    cfg, params = starflow.load(state, options)
    back = starflow.export(params, cfg)
    buffers = {n for n in state if "attn_mask" in n or "feat_rope" in n or n == "var"}
    assert set(back) == set(state) - buffers
    for key, array in back.items():
        assert array.dtype == state[key].dtype
        np.testing.assert_array_equal(array, state[key], err_msg=key)
    layout = "channel_first" if name == "tarflow" else "channel_last"
    image = {"pixels": options["img_size"], "patch": options["patch_size"], "channel_order": layout}
    written = starflow_options.public_options(cfg, image)
    assert {k: written[k] for k in options} == options
    again, same = starflow.load(back, written)
    assert again == cfg
    for key, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(same)[key], err_msg=key)


def test_linears_are_transposed_and_qkv_is_taken_apart():
    state = golden("starflow")
    _, params = starflow.load(state, STARFLOW)
    layers = params["blocks"]["3"]["layers"]
    fused = state["blocks.3.attn_blocks.2.attention.qkv.weight"]
    for i, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(layers[name]["weight"][2], fused[64 * i : 64 * (i + 1)].T)
    up = state["blocks.3.attn_blocks.2.mlp.main.0.weight"]
    np.testing.assert_array_equal(layers["mlp_up"]["weight"][2], up.T)
    np.testing.assert_array_equal(params["blocks"]["1"]["start"], state["blocks.1.sos_embed"][0, 0])


def test_other_options_are_the_published_names_and_shapes():
    state, cfg = synthetic(OTHERS)
    # From the key list of such a run in the layout reference.
    assert state["blocks.2.attn_blocks.1.attention.qkv.weight"].shape == (256, 64)
    assert state["blocks.0.attn_blocks.0.attention.proj.weight"].shape == (48, 128)
    assert state["blocks.2.attn_blocks.0.mlp.gate_proj.weight"].shape == (256, 64)
    assert state["blocks.0.attn_blocks.0.attention.key_norm.weight"].shape == (32,)
    assert state["blocks.2.attn_blocks.0.mlp.post_norm.weight"].shape == (64,)
    assert state["blocks.0.proj_txt.weight"].shape == (48, 20)
    assert len(state) == 19 + 30 and not any(n.startswith("blocks.1.") for n in state)
    read, params = starflow.load(state, OTHERS)
    assert read == cfg
    assert count_params(params) == count_params(flow.declare(cfg))
    back = starflow.export(params, cfg)
    assert all(np.array_equal(back[name], state[name]) for name in state)
    shapes = {"pixels": 8, "patch": 2, "channel_order": "channel_last"}
    assert starflow.load(state, starflow_options.public_options(cfg, shapes))[0] == cfg
    conditioning = flow.Conditioning(text=np.ones((1, 6, 20)))
    z, log_det = flow.forward(params, np.zeros((1, 16, 12), np.float32), cfg, conditioning)
    assert np.isfinite(z).all() and np.isfinite(log_det).all()


@pytest.mark.parametrize(
    "changes",
    [{"rope": 0}, {"sos": 0}, {"rope": 0, "sos": 0, "use_softplus": 0}, {"txt_size": 0}],
)
def test_start_and_position_variants_are_read(changes):
    options = {**STARFLOW, **changes}
    if not options["txt_size"]:
        options = {k: v for k, v in options.items() if k not in ("txt_dim", "cond_top_only")}
    state, cfg = synthetic(options)
    assert ("blocks.0.pos_embed" in state) == (not options["rope"])
    assert ("blocks.0.sos_embed" in state) == bool(options["sos"])
    read, params = starflow.load(state, options)
    assert read == cfg
    back = starflow.export(params, cfg)
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_released_yaml_is_the_3b_model(tmp_path):
    path = tmp_path / "run=1.yaml"
    path.write_text(RELEASED_YAML)
    options, trainer_options = starflow_options.read_options(str(path))
    shapes = {"blocks.5.proj_txt.weight": (3072, 2048)}
    family = starflow_options.find_family(options, set(shapes))
    cfg = starflow_options.flow_config(options, family, shapes)
    assert cfg == flow.starflow_3b()
    published = tensor_map.published_shapes(starflow.table(cfg)).values()
    assert sum(np.prod(shape) for shape in published) == 3_858_281_544
    assert len(published) == 455 - 6 - 3  # masks; var and two rope tables
    assert trainer_options["noise_std"] == 0.3


def test_vocabularies_and_forms_agree(tmp_path):
    yaml_names = {"in_channels": "channel_size", "num_blocks": "blocks"}
    yaml_options = {yaml_names.get(k, k): v for k, v in STARFLOW.items()}
    text = "\n".join(
        f"{key}={' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in yaml_options.items()
    )
    path = tmp_path / "options.yaml"
    path.write_text(starflow_options.to_yaml(STARFLOW))
    plain = tmp_path / "options.txt"
    plain.write_text(text)
    state = golden("starflow")
    commas = text.replace("\n", ", ")
    configs = [
        starflow.load(state, options)[0]
        for options in (STARFLOW, yaml_options, text, commas, path, str(path), plain)
    ]
    assert all(cfg == configs[0] for cfg in configs)
    assert configs[0].layers == (2, 2, 2, 4)


def test_sizes_that_a_run_takes_from_its_data_are_read_from_the_file():
    bare = {k: v for k, v in TARFLOW.items() if k != "num_classes"}
    assert starflow.load(golden("tarflow"), bare)[0].classes == 5
    bare = {k: v for k, v in STARFLOW.items() if k != "txt_dim"}
    assert starflow.load(golden("starflow"), bare)[0].text_channels == 24


def test_an_unconditional_tarflow_is_read():
    state = {n: a for n, a in golden("tarflow").items() if "class_embed" not in n}
    cfg, params = starflow.load(state, {**TARFLOW, "num_classes": 0})
    assert cfg.classes == 0 and cfg.start == "shift"
    assert "class_embed" not in params["blocks"]["0"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_dtype_is_kept(dtype):
    state, cfg = synthetic(STARFLOW, dtype)
    _, params = starflow.load(state, STARFLOW)
    leaves = flatten(params)
    assert all(leaf.dtype == dtype for leaf in leaves.values())
    back = starflow.export(params, cfg)
    assert all(back[n].dtype == dtype and np.array_equal(back[n], state[n]) for n in state)


def test_float16_becomes_float32_and_infinite_weights_are_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    state, _ = synthetic(STARFLOW, np.float16)
    name = "blocks.0.final_norm.weight"
    state[name] = state[name].copy()
    state[name][3] = np.inf
    _, params = starflow.load(state, STARFLOW)
    assert all(leaf.dtype == np.float32 for leaf in flatten(params).values())
    assert len(lines) == 1 and "blocks/0/final_norm/weight are not finite" in lines[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_named(prefix):
    state = {f"{prefix}{name}": array for name, array in golden("starflow").items()}
    with pytest.raises(ValueError, match=f"names begin with {prefix!r}.*torch.compile") as error:
        starflow.load(state, {**STARFLOW, "family": "starflow"})
    assert "missing" not in str(error.value)


def test_jax_arrays_are_exported():
    state = golden("tarflow")
    cfg, params = starflow.load(state, TARFLOW)
    back = starflow.export(_map(lambda _, a: jnp.asarray(a), params), cfg)
    assert all(np.array_equal(back[name], state[name]) for name in back)


def test_missing_unexpected_and_misshapen_names_are_listed_together():
    state = golden("starflow")
    del state["blocks.1.final_norm.weight"]
    del state["blocks.3.attn_blocks.2.attention.qkv.bias"]
    state["blocks.0.final_norm.wieght"] = np.zeros(64, np.float32)
    state["blocks.2.proj_in.weight"] = state["blocks.2.proj_in.weight"].T
    with pytest.raises(ValueError, match="2 missing") as error:
        starflow.load(state, STARFLOW)
    for part in (
        "blocks.1.final_norm.weight, blocks.3.attn_blocks.2.attention.qkv.bias",
        "1 unexpected: blocks.0.final_norm.wieght",
        "1 misshapen: blocks.2.proj_in.weight is [4, 64], expected [64, 4]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_final_norm": 0}, "4 unexpected: blocks.0.final_norm.weight"),
        ({"rope": 0}, "4 missing: blocks.0.pos_embed"),
        ({"layers_per_block": [2, 2, 2, 5]}, "blocks.3.attn_blocks.4.attention.norm.weight"),
        ({"use_qk_norm": 1}, "20 missing: .*blocks.0.attn_blocks.0.attention.query_norm.weight"),
        ({"txt_dim": 25}, r"blocks.3.proj_txt.weight is \[64, 24\], expected \[64, 25\]"),
        ({"cond_top_only": 0}, "6 missing: .*blocks.0.proj_txt.weight"),
        ({"img_size": 16}, r"var is \[64, 4\], expected \[256, 4\]"),
    ],
)
def test_options_of_another_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        starflow.load(golden("starflow"), {**STARFLOW, **change})


def test_unsupported_and_mixed_dtypes_are_refused():
    state = golden("starflow")
    state["blocks.0.final_norm.weight"] = state["blocks.0.final_norm.weight"].astype(np.int32)
    with pytest.raises(ValueError, match=r"blocks.0.final_norm.weight is int32"):
        starflow.load(state, STARFLOW)
    state["blocks.0.final_norm.weight"] = np.zeros(64, np.float64)
    with pytest.raises(ValueError, match=r"not of one dtype.*blocks.0.final_norm.weight"):
        starflow.load(state, STARFLOW)


def test_a_tarflow_with_another_prior_variance_is_refused():
    state = golden("tarflow")
    del state["var"]
    starflow.load(state, TARFLOW)
    state["var"] = np.ones((16, 48), np.float32)
    state["var"][3, 5] = 1.5
    with pytest.raises(ValueError, match=r"var: a prior variance.*0\.5 off"):
        starflow.load(state, TARFLOW)
    # A dead buffer in STARFlow.
    other = golden("starflow")
    other["var"] = other["var"] * 3
    starflow.load(other, STARFLOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_causal": 2}, "temporal_causal=2 belongs to the video model"),
        ({"learnable_self_denoiser": 1}, "learnable_self_denoiser=1 belongs to the video"),
        ({"local_attn_window": 8}, "local_attn_window=8 belongs"),
        ({"shallow_block_local": True}, "shallow_block_local=True belongs"),
        ({"use_pretrained_lm": "gemma2_2b"}, "pretrained language model"),
        ({"nvp": 0}, "nvp=0"),
        ({"soft_clp": 4}, "unknown 'soft_clp'; did you mean 'soft_clip'"),
        ({"norm_type": "none"}, "norm_type='none'"),
        ({"channel_size": 3}, "in_channels is given twice, 4 and 3"),
        ({"img_size": None}, "img_size is missing"),
        ({"layers_per_block": [2, 2, 4]}, "num_blocks=4, but layers_per_block has 3"),
        ({"layers_per_block": "2 2 x"}, "layers_per_block='2 2 x' is not whole"),
        ({"layers_per_block": [2, 2, 2, 0]}, "the last block has at least 1 layer"),
        ({"num_classes": 10, "family": "starflow"}, "STARFlow has no class vectors"),
        ({"family": "glow"}, "family='glow'"),
        ({"patch_size": 3}, r"img_size=8 is not a multiple of patch_size \(3\)"),
        ({"vae": "somebody/other"}, "vae='somebody/other' is not known"),
        ({"head_dim": 16}, "head_dim=16 leaves no RoPE pairs"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        starflow.load(golden("starflow"), {**STARFLOW, **change})


def test_falsy_video_options_and_trainer_options_are_accepted():
    extra = dict(temporal_causal=0, use_pretrained_lm="none", vid_size=None, lr=1e-4, cfg=2.5)
    assert starflow.load(golden("starflow"), {**STARFLOW, **extra})[0].width == 64


def test_self_denoiser_weights_are_refused():
    state = golden("starflow")
    state["learnable_self_denoiser.proj_in.bias"] = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="self-denoiser is not converted"):
        starflow.load(state, STARFLOW)


def test_the_family_follows_from_options_and_tensors():
    find = starflow_options.find_family
    assert find({"num_classes": 5}, set()) == "tarflow"
    assert find({}, {"blocks.0.class_embed", "blocks.0.pos_embed"}) == "tarflow"
    assert find({}, {"blocks.0.sos_embed"}) == "starflow"
    assert find({}, {"feat_rope.freqs_cos"}) == "starflow"
    assert find({"use_softplus": 0}, {"blocks.0.pos_embed"}) == "starflow"
    assert find({"channels": 8}, {"blocks.0.pos_embed"}) == "tarflow"
    assert find({"family": "starflow"}, {"blocks.0.class_embed"}) == "starflow"
    with pytest.raises(ValueError, match="TarFlow has no rope, sos"):
        starflow.load(golden("tarflow"), {**TARFLOW, "rope": 1, "sos": 1})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("/nowhere/options.yaml", FileNotFoundError, "no file /nowhere/options.yaml"),
        ("a: [1\nb", ValueError, "neither key=value nor YAML"),
        ("- 1\n- 2", ValueError, "expected names and values"),
        ("rope=1 rope=0", ValueError, "rope is given twice"),
        ("arguments:\n- rope: 1\n- rope: 0", ValueError, "rope is given twice"),
        ("blocks=nan blocks=2", ValueError, "blocks is given twice, 'nan' and '2'"),
        ("arguments:\n- rope", ValueError, "expected a list of name: value"),
    ],
)
def test_bad_option_texts_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        starflow_options.read_options(text)


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "1e12", "two"])
def test_options_that_are_no_numbers_are_refused(number):
    for name in ("blocks", "soft_clip", "img_size"):
        with pytest.raises(ValueError, match=f"options: {name}=.* is not a number from 0"):
            starflow_options.read_options(f"{name}={number} patch_size=2")
    with pytest.raises(ValueError, match=r"layers_per_block=.* is not whole"):
        starflow_options.flow_config({**STARFLOW, "layers_per_block": [1e999]}, "starflow", {})


def test_a_file_of_options_that_is_no_text_is_named(tmp_path):
    (tmp_path / "options.yaml").write_bytes(b"rope: \xff")
    with pytest.raises(ValueError, match=r"options: .*options\.yaml: not UTF-8"):
        starflow_options.read_options(tmp_path / "options.yaml")
    for text in ("[" * 3000, "a: [1\nb", "- 1"):
        (tmp_path / "options.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"options: .*options\.yaml: (neither|expected)"):
            starflow_options.read_options(tmp_path / "options.yaml")


def test_export_lists_every_difference():
    cfg, params = starflow.load(golden("starflow"), STARFLOW)
    block = dict(params["blocks"]["0"])
    del block["start"]
    block["extra"] = np.zeros(3)
    block["final_norm"] = {"weight": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        starflow.export({"blocks": {**params["blocks"], "0": block}}, cfg)
    assert "1 missing: blocks/0/start; 1 unexpected: blocks/0/extra" in str(error.value)
    assert "blocks/0/final_norm/weight is [3], expected [64]" in str(error.value)


def test_flows_without_public_options_are_refused():
    prefix = flow.FlowConfig(4, 4, 64, (1, 1), start="prefix", text_channels=8, text_length=4)
    with pytest.raises(ValueError, match="start='prefix'"):
        starflow_options.public_options(prefix)
    for changes in ({"rope_frequencies": "grid"}, {"key_positions": "own"}):
        other_positions = flow.FlowConfig(4, 4, 64, (1, 1), **changes)
        with pytest.raises(ValueError, match="the published code has 'released' and 'next' alone"):
            starflow_options.public_options(other_positions)
    classes = flow.FlowConfig(4, 4, 64, (1, 1), classes=3)
    with pytest.raises(ValueError, match="TarFlow's options cannot express this flow"):
        starflow_options.public_options(classes)
