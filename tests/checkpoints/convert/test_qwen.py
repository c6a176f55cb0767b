"""Qwen2.5-VL folders of both styles are loaded, sharded or not, exported, and checked."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import published_qwen
from helpers.paths import ROOT
from peer import torch_qwen
from safetensors.numpy import save_file

from starflow2_jax.checkpoints import tensor_files
from starflow2_jax.checkpoints.convert import qwen as convert_qwen, tensor_map
from starflow2_jax.checkpoints.convert.qwen_options import public_options, read_options
from starflow2_jax.mesh import make_mesh
from starflow2_jax.models import qwen
from starflow2_jax.params import flatten, shardings as param_shardings

GOLDEN = ROOT / "tests" / "golden" / "qwen_tiny.npz"


@pytest.fixture(scope="module")
def published():
    """The nested config.json and the state dict that transformers saved."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    state = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return json.loads(str(arrays["config"])), state


def older(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write(folder, config, state, shards=3):
    """Write a folder as published: config.json, shards and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, file_of_name = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard_names = names[i::shards]
        save_file({name: np.ascontiguousarray(state[name]) for name in shard_names}, folder / file)
        file_of_name |= {name: file for name in shard_names}
    index = {"metadata": {}, "weight_map": file_of_name}
    (folder / tensor_files.INDEX_FILE).write_text(json.dumps(index))
    return folder


def same(a, b):
    a, b = flatten(a), flatten(b)
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype and np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in a
    )


@pytest.mark.fast
def test_both_styles_of_files_are_one_model(tmp_path, published):
    config, state = published
    cfg, params = convert_qwen.load(write(tmp_path / "new", config, state))
    assert cfg == read_options(config)
    flat = {**config, **config["text_config"], "model_type": "qwen2_5_vl"}
    del flat["text_config"], flat["rope_parameters"]
    flat |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    flat["vision_config"] = {k: v for k, v in flat["vision_config"].items() if "rope" not in k}
    renamed = {older(name): array for name, array in state.items()}
    assert any(name.startswith("visual.") for name in renamed)
    again, loaded = convert_qwen.load(write(tmp_path / "old", flat, renamed, shards=1))
    assert again == cfg and same(loaded, params)
    layer = params["layers"]["query"]["weight"][1]
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(layer, state[name].T)
    fused = state["model.visual.blocks.2.attn.qkv.bias"]
    np.testing.assert_array_equal(params["vision"]["layers"]["key"]["bias"][2], fused[16:32])


@pytest.mark.fast
def test_export_and_back(tmp_path, published):
    cfg, params = convert_qwen.load(write(tmp_path / "in", *published))
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    convert_qwen.export(params, cfg, tmp_path / "out", processor=tmp_path / "in", extra={"eos": 5})
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["eos"] == 5 and written["torch_dtype"] == "float32"
    exported = tensor_files.open_source(tmp_path / "out")
    assert {name: exported[name].shape for name in exported} == {
        older(name): array.shape for name, array in published[1].items()
    }
    for name, array in published[1].items():
        np.testing.assert_array_equal(exported[older(name)].read(), array)
    again, loaded = convert_qwen.load(tmp_path / "out")
    assert again == cfg and same(loaded, params)
    with pytest.raises(FileExistsError, match="nothing was written over"):
        convert_qwen.export(params, cfg, tmp_path / "out")
    broken = {**params, "embed": {"weight": params["embed"]["weight"][:5]}}
    del broken["head"]
    with pytest.raises(
        ValueError, match=r"1 missing: head/weight; .*embed/weight is \[5, 32\], exp"
    ):
        convert_qwen.export(broken, cfg, tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer_config\.json"):
        convert_qwen.export(params, cfg, tmp_path / "no", processor=tmp_path)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("layout", "sizes", "dtype"),
    [
        ("fsdp", "fsdp=8", jnp.bfloat16),
        ("fsdp_tp", "fsdp=2,tensor=4", None),
        ("dp", "data=8", None),
    ],
)
def test_sharded_loads_equal(tmp_path, published, layout, sizes, dtype):
    config, state = published
    folder = write(tmp_path / "in", config, state)
    cfg, plain = convert_qwen.load(folder)
    mesh = make_mesh(sizes)
    cfg, params = convert_qwen.load(folder, mesh, layout, dtype)
    assert same(params, jax.tree.map(lambda a: a.astype(dtype or a.dtype), plain))
    shardings = flatten(param_shardings(qwen.declare(cfg), mesh, layout))
    for name, leaf in flatten(params).items():
        assert leaf.sharding == shardings[name], name


def test_a_layout_that_does_not_divide_is_refused(tmp_path, published):
    folder = write(tmp_path / "in", *published)
    with pytest.raises(
        ValueError, match=r"weight \S+ has 96 in .*\(vocab\), .* 'tensor' of size 5"
    ):
        convert_qwen.load(folder, make_mesh("tensor=5", jax.devices()[:5]), "tp")


def test_dtypes_are_kept_or_converted(tmp_path, published):
    config, state = published
    low = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    cfg, params = convert_qwen.load(write(tmp_path / "low", config, low))
    assert params["embed"]["weight"].dtype == jnp.bfloat16
    convert_qwen.export(params, cfg, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(convert_qwen.load(tmp_path / "out")[1], params)
    mixed = {**state, "lm_head.weight": low["lm_head.weight"]}
    folder = write(tmp_path / "mixed", config, mixed)
    with pytest.raises(ValueError, match="tensors of bfloat16, float32; say which dtype"):
        convert_qwen.load(folder)
    _, params = convert_qwen.load(folder, dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_tied_head_is_not_loaded_twice(tmp_path, published):
    config, state = published
    config, state = {**config, "tie_word_embeddings": True}, dict(state)
    head = state.pop("lm_head.weight")
    cfg, params = convert_qwen.load(write(tmp_path / "tied", config, state))
    assert cfg.tied and "head" not in params
    convert_qwen.export(params, cfg, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    nested = {**config, "tie_word_embeddings": False}
    nested["text_config"] = {**config["text_config"], "tie_word_embeddings": True}
    assert read_options(nested).tied
    # Some savers write the tied tensor twice.
    twice = {**state, "lm_head.weight": state["model.language_model.embed_tokens.weight"]}
    assert same(convert_qwen.load(write(tmp_path / "twice", config, twice))[1], params)
    with pytest.raises(ValueError, match=r"ties the head, but lm_head\.weight is not model\.embed"):
        convert_qwen.load(write(tmp_path / "untied", config, {**state, "lm_head.weight": head}))


# --------------------------------------------------------------------------------------- bad input


def test_damaged_folders_are_refused(tmp_path, published):
    folder = write(tmp_path / "in", *published)
    with pytest.raises(FileNotFoundError, match=r"no such file; is .* a model folder"):
        convert_qwen.load(tmp_path / "nowhere")
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is truncated or not"):
        convert_qwen.load(folder)
    shard.write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors is truncated or not"):
        convert_qwen.load(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"names missing shards model-00002-of-00003\.saf"):
        convert_qwen.load(folder)
    shard.write_bytes(content)
    index = folder / tensor_files.INDEX_FILE
    text = index.read_text()
    index.write_text(text.replace('"lm_head.weight"', '"model.language_model.norm.weight"'))
    with pytest.raises(ValueError, match=r"named twice: model\.language_model\.norm\.weight"):
        convert_qwen.load(folder)
    index.write_text(text)
    extra = {"model.norm.weight": published[1]["model.language_model.norm.weight"]}
    both = write(tmp_path / "both", published[0], {**published[1], **extra})
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight under two names"):
        convert_qwen.load(both)


def test_names_and_shapes_are_strict(tmp_path, published):
    config, state = published
    other = {older(name): array for name, array in state.items()}
    del other["model.layers.1.mlp.up_proj.weight"], other["visual.merger.ln_q.weight"]
    other |= {
        "model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
        "model.norm.weight": np.ones(31, np.float32),
        "lm_head.weight": np.zeros((96, 32), np.int8),
    }
    with pytest.raises(ValueError, match=r"does not hold the model of its config\.json") as error:
        convert_qwen.load(write(tmp_path / "in", config, other))
    for part in (
        "2 missing: model.layers.1.mlp.up_proj.weight, visual.merger.ln_q.weight",
        "1 unexpected: model.layers.2.mlp.up_proj.weight",
        "1 misshapen: model.norm.weight is [31], expected [32]",
        "1 not floating point: lm_head.weight is int8",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_vl", "model_type='qwen2_vl', expected 'qwen2_5_vl'"),
        ("model_type", None, "model_type=None"),
        ("vision_config", None, "vision_config is missing"),
        ("text_config.hidden_act", "relu", r"text_config\.hidden_act='relu' is not one of silu"),
        ("vision_config.hidden_act", "quick_gelu", r"vision_config\.hidden_act='quick_gelu'"),
        ("text_config.hidden_size", "32", r"text_config\.hidden_size='32' is not a whole number"),
        ("text_config.hidden_size", 30, "hidden_size=30 is not 4 heads of 7"),
        ("text_config.head_dim", 16, "hidden_size=32 is not 4 heads of 16"),
        ("text_config.num_key_value_heads", 3, "heads=4 is not a multiple of kv_heads=3"),
        ("quantization_config", {"quant_method": "awq"}, r"the weights are quantized \(awq\)"),
        ("text_config.use_sliding_window", True, "use_sliding_window=True is not supported"),
        (
            "text_config.rope_parameters",
            {"rope_type": "yarn", "factor": 4.0},
            r"text_config\.rope_parameters of type 'yarn' is not one of mrope, default",
        ),
        (
            "text_config.rope_parameters",
            {"rope_type": "default", "mrope_section": [1, 1]},
            r"sections=\(1, 1\) must be three numbers that sum to half of the 8 head channels",
        ),
        (
            "text_config.rope_parameters",
            {"type": "mrope", "mrope_section": [1, 1, 2], "factor": 2.0},
            "factor=2.0 is not supported",
        ),
        (
            "vision_config.rope_parameters",
            {"rope_type": "linear"},
            r"vision_config\.rope_parameters=.* is not supported",
        ),
        ("vision_config.fullatt_block_indexes", "7", "fullatt_block_indexes='7' is no list"),
        ("vision_config.out_hidden_size", 64, "out_width=64 is not width=32"),
        ("vision_config.patch_size", [4, 4], r"vision_config\.patch_size=\[4, 4\] is not a whole"),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path, published, path, value, message):
    config = json.loads(json.dumps(published[0]))
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        convert_qwen.load(tmp_path)


def test_every_published_configuration_goes_round():
    for preset in (
        qwen.qwen2_5_vl_3b,
        qwen.qwen2_5_vl_7b,
        published_qwen.qwen2_5_vl_32b,
        published_qwen.qwen2_5_vl_72b,
    ):
        assert read_options(json.loads(json.dumps(public_options(preset())))) == preset()
    with pytest.raises(ValueError, match="the configuration has none"):
        public_options(qwen.qwen2_5_vl_7b(vision=None))


# ------------------------------------------------------------------------------------------ memory

MEASURE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from starflow2_jax.mesh import make_mesh
from starflow2_jax.checkpoints.convert import qwen

def peak():
    # This counts mapped pages; ru_maxrss would start from the memory of the parent process.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

mesh = make_mesh("fsdp=8")
jnp.zeros(8).block_until_ready()
before = peak()
cfg, params = qwen.load(sys.argv[1], mesh, "fsdp", jnp.dtype(sys.argv[2]))
leaves = jax.block_until_ready(jax.tree.leaves(params))
after = peak()
array_bytes = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
print(before, after, array_bytes, float(params["head"]["weight"][5, 7]))
"""


def write_random(folder, cfg, shard_bytes):
    """Write a sharded bfloat16 model of `cfg`. Return its size and that of its largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(public_options(cfg)))
    noise = np.random.default_rng(0).normal(size=1 << 22).astype(ml_dtypes.bfloat16)
    files, shard, filled, total, largest = {}, {}, 0, 0, 0

    def flush():
        file = f"model-{len(set(files.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in tensor_map.published_shapes(convert_qwen.table(cfg)).items():
        shard[name] = np.resize(noise, shape)
        size = shard[name].nbytes
        filled, total, largest = filled + size, total + size, max(largest, size)
        if filled > shard_bytes:
            flush()
            filled = 0
    flush()
    (folder / tensor_files.INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    assert len(set(files.values())) > 3
    return total, largest


def measure(folder, dtype):
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    before, peak, array_bytes, value = result.stdout.split()
    return int(before), int(peak), int(array_bytes), float(value)


def small_7b(**sizes):
    vision = qwen.qwen2_5_vl_7b().vision
    changed = {"depth": 2, "full_layers": (1,), "out_width": sizes["width"]}
    vision = vision.__class__(**{**vision.__dict__, **changed})
    return qwen.qwen2_5_vl_7b(vision=vision, **sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_of_a_load(tmp_path, dtype):
    """A load of 200 MB needs the arrays plus one tensor, as stored and as converted."""
    cfg = small_7b(vocab=16384, width=1024, layers=6, heads=8, kv_heads=2, mlp_width=4096)
    try:
        total, largest = write_random(tmp_path / "in", cfg, 30 << 20)
        assert total > 200 << 20
        before, peak, array_bytes, value = measure(tmp_path / "in", dtype)
    finally:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
    width = np.dtype(jnp.dtype(dtype)).itemsize
    # The fsdp layout replicates norms and other small arrays.
    assert total / 2 * width <= array_bytes < 1.02 * total / 2 * width
    # The rest is the allocator's own: up to 56 MiB were seen next to other tests.
    limit = array_bytes + largest * (1 + width / 2) + (64 << 20)
    assert peak - before <= limit, (before, peak, array_bytes)
    assert value != 0


@pytest.mark.slow
def test_memory_of_a_load_of_six_gigabytes(tmp_path):
    cfg = small_7b(layers=8, width=3584)
    try:
        total, largest = write_random(tmp_path / "in", cfg, 1 << 30)
        assert total > 6e9 and largest > 1e9
        before, peak, array_bytes, _ = measure(tmp_path / "in", "bfloat16")
    finally:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
    print(f"files {total}, arrays {array_bytes}, before {before}, peak {peak}")
    assert total <= array_bytes < 1.02 * total
    assert peak <= array_bytes + 2e9 + largest, (before, peak, array_bytes)


# -------------------------------------------------------------------------------------- with torch


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_export(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="parity needs the [parity] extra")
    from transformers import Qwen2_5_VLForConditionalGeneration as Public

    model = torch_qwen.make(seed=7, tied=tied)
    model.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    assert (tmp_path / "in" / tensor_files.INDEX_FILE).exists()
    cfg, params = convert_qwen.load(tmp_path / "in")
    convert_qwen.export(params, cfg, tmp_path / "out", extra={"bos_token_id": 0, "eos_token_id": 1})
    again = (
        Public.from_pretrained(tmp_path / "out", trust_remote_code=False)
        .eval()
        .requires_grad_(False)
    )
    inputs = torch_qwen.CASES["three_left"]()
    actual, expected = torch_qwen.reference(again, inputs), torch_qwen.reference(model, inputs)
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, err_msg=key)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
