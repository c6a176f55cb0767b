"""DINOv2 equals transformers: live if torch is installed, and by stored arrays everywhere.

`PYTHONPATH=.:tests python tests/models/fae/test_dinov2.py` writes `golden/dinov2_tiny.npz` anew.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_parity import error
from helpers.paths import GOLDEN
from safetensors.numpy import save_file

from starflow2_jax.checkpoints.convert import dinov2 as loader
from starflow2_jax.mesh import LAYOUTS, batch_sharding, make_mesh
from starflow2_jax.models.fae import dinov2
from starflow2_jax.params import (
    abstract as abstract_params,
    count as count_params,
    flatten,
    shardings as param_shardings,
)

GOLDEN = GOLDEN / "dinov2_tiny.npz"
TOLERANCE = 1e-5
VARIANTS = {
    "plain": {},
    "gated": {"use_swiglu_ffn": True},
    "registers": {"num_register_tokens": 3},
    "gated_registers": {"num_register_tokens": 2, "use_swiglu_ffn": True, "qkv_bias": False},
}
SIZES = ((16, 16), (24, 12))


def reference(variant):
    """A small random model of transformers: config.json, its tensors, and what it gives."""
    import tempfile
    from pathlib import Path

    import torch
    import transformers
    from safetensors import safe_open

    options = VARIANTS[variant]
    kind = "Dinov2WithRegisters" if "num_register_tokens" in options else "Dinov2"
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"image_size": 16, "patch_size": 4}
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**common, **options)
    ).eval()
    draw = np.random.default_rng(sorted(VARIANTS).index(variant))
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            scale = 0.3 if weight.ndim > 1 else 0.5
            fresh = draw.normal(size=tuple(weight.shape)) * scale + ("lambda" in name)
            weight.copy_(torch.from_numpy(fresh))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            with safe_open(Path(folder) / "model.safetensors", "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cases = {}
        for size in SIZES:
            image = draw.normal(size=(2, *size, 3)).astype(np.float32)
            pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
            out = model(pixels, output_hidden_states=True)
            hidden = np.stack([h.numpy() for h in out.hidden_states])
            cases[size] = (image, hidden, out.last_hidden_state.numpy())
    return config, tensors, cases


def write_folder(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def check(cfg, params, cases):
    """Largest relative error of every hidden state and of the normed tokens."""
    worst = 0.0
    for image, hidden, last in cases.values():
        run = jax.jit(dinov2.forward, static_argnums=2, static_argnames="hidden")
        out = run(params, image, cfg, hidden=True)
        tokens = jnp.concatenate([out.class_token[:, None], out.registers, out.patches], 1)
        assert out.hidden.shape == hidden.shape and tokens.shape == last.shape
        assert out.registers.shape[1] == cfg.registers
        errors = [error(a, b) for a, b in zip(out.hidden, hidden)] + [error(tokens, last)]
        assert max(errors) <= TOLERANCE, errors
        worst = max(worst, *errors)
    return worst


def golden(variant):
    with np.load(GOLDEN) as file:
        arrays = {
            k.removeprefix(f"{variant}/"): file[k]
            for k in file.files
            if k.startswith(f"{variant}/")
        }
    tensors = {k.removeprefix("tensors/"): v for k, v in arrays.items() if k.startswith("tensors/")}
    cases = {
        s: tuple(arrays[f"{s[0]}x{s[1]}/{k}"] for k in ("image", "hidden", "last")) for s in SIZES
    }
    return json.loads(str(arrays["config"])), tensors, cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, tensors, _ = golden("plain")
    return write_folder(tmp_path_factory.mktemp("dinov2"), config, tensors)


@pytest.mark.fast
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_parity(variant, tmp_path):
    config, tensors, cases = golden(variant)
    cfg, params = loader.load(write_folder(tmp_path, config, tensors))
    assert count_params(params) == count_params(dinov2.declare(cfg))
    check(cfg, params, cases)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_transformers(variant, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config, tensors, cases = reference(variant)
    worst = check(*loader.load(write_folder(tmp_path, config, tensors)), cases)
    print(f"{variant}: worst relative error {worst:.1e}")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("inputs,outputs", [(37, 16), (4, 7), (5, 5), (3, 1), (8, 2)])
def test_resampling_as_torch(inputs, outputs, antialias):
    matrix = dinov2.resize_matrix(inputs, outputs, antialias)
    assert np.allclose(matrix.sum(1), 1)
    if inputs == outputs:
        assert np.allclose(matrix, np.eye(inputs))
    torch = pytest.importorskip("torch")
    identity = torch.eye(inputs)[None, :, :, None].expand(1, inputs, inputs, inputs).contiguous()
    size = (outputs, inputs)
    expected = torch.nn.functional.interpolate(
        identity, size=size, mode="bicubic", align_corners=False, antialias=antialias
    )
    assert np.abs(expected[0, :, :, 0].numpy().T - matrix).max() < 1e-5


def test_mesh_and_dtype(folder):
    """Every layout has the values of one device, in the requested dtype."""
    cfg, single_device = loader.load(folder)
    mesh = make_mesh("fsdp=4,tensor=2")
    for layout in LAYOUTS:
        _, sharded = loader.load(folder, mesh, layout)
        for name, leaf in flatten(sharded).items():
            np.testing.assert_array_equal(np.asarray(leaf), flatten(single_device)[name])
    shardings = flatten(param_shardings(dinov2.declare(cfg), mesh, layout))
    assert all(leaf.sharding == shardings[name] for name, leaf in flatten(sharded).items())
    _, bfloat16_params = loader.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(bfloat16_params)} == {jnp.dtype(jnp.bfloat16)}


def test_gradient_reaches_the_image_and_remat_changes_nothing(folder):
    cfg, params = loader.load(folder)
    image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))

    def energy(image, cfg):
        return jnp.square(dinov2.forward(params, image, cfg).patches[..., 0]).sum()

    slope = jax.jit(jax.grad(energy), static_argnums=1)
    plain = slope(image, cfg)
    remat = slope(image, dataclasses.replace(cfg, remat="full"))
    assert jnp.abs(plain).min() > 0
    np.testing.assert_allclose(plain, remat, atol=1e-5)


def test_preprocess():
    """A gray image keeps its color through the resize, and the scale is ImageNet's."""
    gray = jnp.full((1, 32, 32, 3), 0.2)
    out = dinov2.preprocess(gray, 28)
    assert out.shape == (1, 28, 28, 3)
    expected = (0.6 - np.array(dinov2.PIXEL_MEAN)) / np.array(dinov2.PIXEL_STD)
    np.testing.assert_allclose(out[0, 3, 5], expected, rtol=1e-5)
    np.testing.assert_allclose(
        dinov2.preprocess(gray), jnp.broadcast_to(out[:, :1, :1], gray.shape), rtol=1e-5
    )


# Parameters of transformers' models of these sizes, their mask token among them.
COUNTS = {
    "small": 22_056_576,
    "base": 86_580_480,
    "large": 304_368_640,
    "giant": 1_136_480_768,
    "small_registers": 22_058_112,
    "giant_registers": 1_136_486_912,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    cfg = dinov2.preset(name)
    assert count_params(dinov2.declare(cfg)) + cfg.width == COUNTS[name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_giant_lowers_under_every_layout(layout):
    cfg = dinov2.preset("giant", compute_dtype="bfloat16")
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    params = abstract_params(dinov2.declare(cfg), mesh, layout, jnp.bfloat16)
    image = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda p, x: dinov2.forward(p, x, cfg).patches).lower(params, image)
    assert lowered.out_info.shape == (8, 256, 1536)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"model_type": "vit"}, ["model_type='vit'", "dinov2_with_registers"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act='quick_gelu'"]),
        ({"num_channels": 1}, ["num_channels=1"]),
        ({"image_size": [16, 8]}, ["image_size=[16, 8]"]),
        ({"num_hidden_layers": None}, ["'num_hidden_layers' is missing"]),
        ({"num_hidden_layers": 3}, ["missing", "encoder.layer.2.norm1.weight"]),
        ({"num_hidden_layers": 1}, ["unexpected", "encoder.layer.1.norm1.weight"]),
        ({"use_swiglu_ffn": True}, ["missing", "mlp.weights_in", "unexpected", "mlp.fc1"]),
        ({"image_size": 20}, ["position_embeddings is [1, 17, 16], expected [1, 26, 16]"]),
        ({"model_type": "dinov2_with_registers"}, ["missing: embeddings.register_tokens"]),
    ],
)
def test_bad_config(change, words, tmp_path):
    config, tensors, _ = golden("plain")
    config = {k: v for k, v in (config | change).items() if v is not None}
    with pytest.raises(ValueError) as caught:
        loader.load(write_folder(tmp_path, config, tensors))
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_files_and_images(folder, tmp_path):
    config, tensors, _ = golden("plain")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loader.load(tmp_path / "nowhere")
    damaged = write_folder(tmp_path / "damaged", config, tensors)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        loader.load(damaged)
    renamed = {name.replace("norm1", "norm3"): t for name, t in tensors.items()}
    with pytest.raises(ValueError, match=r"4 missing: .*, encoder\.layer\.0\.norm1\.weight"):
        loader.load(write_folder(tmp_path / "renamed", config, renamed))
    cfg, params = loader.load(folder)
    with pytest.raises(ValueError, match="18 x 16 pixels are not divisible by patch=4"):
        dinov2.forward(params, jnp.zeros((1, 18, 16, 3)), cfg)
    with pytest.raises(ValueError, match="preset 'huge'"):
        dinov2.preset("huge")
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=4"):
        dinov2.DinoConfig(width=10, layers=1, heads=4, mlp_width=8)


if __name__ == "__main__":
    arrays = {}
    for variant in VARIANTS:
        config, tensors, cases = reference(variant)
        arrays[f"{variant}/config"] = np.array(json.dumps(config))
        arrays |= {f"{variant}/tensors/{name}": tensor for name, tensor in tensors.items()}
        for (height, width), case in cases.items():
            names = (f"{variant}/{height}x{width}/{name}" for name in ("image", "hidden", "last"))
            arrays |= dict(zip(names, case))
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
