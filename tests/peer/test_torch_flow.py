"""The PyTorch yardstick reproduces the published programs' numbers, so others may lean on it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import ROOT

torch = pytest.importorskip("torch", reason="the yardstick needs the [parity] extra")

from peer import torch_flow  # noqa: E402
from peer.option_cases import CASES, compute  # noqa: E402

TARFLOW = dict(in_channels=3, img_size=16, patch_size=4, channels=64, num_blocks=4,
               layers_per_block=2, nvp=True)  # fmt: skip
STARFLOW = dict(in_channels=4, img_size=8, patch_size=1, channels=64, num_blocks=4,
                layers_per_block=[2, 2, 2, 4], head_dim=32, rope=1, sos=1, txt_size=8, txt_dim=24,
                cond_top_only=1, use_softplus=1, use_final_norm=1, soft_clip=4,
                seq_order="L2R")  # fmt: skip
FORWARD = {"f32": 1e-5, "f64": 1e-10, "f64_hd16": 1e-10, "f64_exact_rope": 1e-10}
SAMPLES = FORWARD | {"f32": 5e-5}
ROPE_IN_F32 = 1e-8  # the published program rounds rope frequencies to float32 in its f64 run


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are far too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden(name: str) -> dict:
    shared = Path(os.environ.get("STARFLOW2_SHARED", ROOT.parent / "shared"))
    for folder in (ROOT / "tests" / "golden", shared / "golden"):
        if (folder / name).exists():
            return dict(np.load(folder / name))
    pytest.skip(f"no {name} in tests/golden or {shared}/golden")


def build(options: dict, data: dict, run: str):
    """The model with the golden weights, and a function that makes inputs of the run's dtype."""
    dtype = torch.float32 if run == "f32" else torch.float64
    flow = torch_flow.Flow(options).to(dtype)
    names = flow.state_dict().keys()
    weights = {k: torch.from_numpy(data[f"params/{k}"]) for k in names}
    flow.load_state_dict(weights, strict=True)
    return flow, lambda key: torch.from_numpy(data[key]).to(dtype)


def close(actual, expected, tolerance):
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected)) / max(1.0, np.max(np.abs(expected)))
    assert error <= tolerance, f"off by {error:.2e}, allowed {tolerance:.0e}"


def check_gradients(flow, image, loss, data, run, names, tolerance):
    parameters = dict(flow.named_parameters())
    assert sorted(names) == sorted(parameters)
    grads = torch.autograd.grad(loss, [image, *(parameters[name] for name in names)])
    close(grads[0], data[f"{run}/grad_x"], tolerance)
    close([g.double().norm().item() for g in grads[1:]], data[f"{run}/grad_norms"], tolerance)


def check_adamw(flow, compute, expected, expected_total, tolerance):
    """`compute()` gives (plain loss, loss that is trained)."""
    optimizer = torch.optim.AdamW(
        flow.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4
    )
    plain, total = [], []
    for _ in range(6):
        optimizer.zero_grad()
        losses = compute()
        plain.append(losses[0].item())
        total.append(losses[1].item())
        losses[1].backward()
        optimizer.step()
    close(plain, expected, tolerance)
    close(total, expected_total, tolerance)


@pytest.mark.parametrize("run", ["f32", "f64", "f64_hd16"])
@pytest.mark.parametrize("kind", ["cond", "uncond"])
def test_tarflow_forward(run, kind):
    data = golden("tarflow_tiny.npz")
    options = TARFLOW | {"head_dim": 16 if run == "f64_hd16" else 64}
    options |= {"num_classes": 5} if kind == "cond" else {}
    flow, array = build(options, data, run)
    assert {f"params/{k}" for k in flow.state_dict()} == {
        k for k in data if k.startswith("params/") and (kind == "cond" or "class" not in k)
    }
    labels = {"y": data["y"], "ydrop": data["y_drop"], "ynone": None}
    for name, y in labels.items() if kind == "cond" else [("ynone", None)]:
        key = f"{run}/{kind}/{name}"
        image = array("x").requires_grad_()
        y = None if y is None else torch.from_numpy(y)
        outputs, log_dets = flow(flow.patchify(image), labels=y)
        loss = flow.loss(outputs, log_dets)
        close(outputs[-1], data[f"{key}/z"], FORWARD[run])
        close(sum(d.mean(dim=(1, 2)) for d in log_dets), data[f"{key}/logdet"], FORWARD[run])
        close(loss, data[f"{key}/loss"], FORWARD[run])
        for i in range(4):
            if f"{key}/block_out_{i}" in data:
                close(outputs[i + 1], data[f"{key}/block_out_{i}"], FORWARD[run])
        if f"{key}/grad_x" in data:
            names = data[f"param_names/{kind}"]
            check_gradients(flow, image, loss, data, key, names, FORWARD[run])
    key = f"{run}/{kind}/adamw_losses"
    if key in data:
        y = torch.from_numpy(data["y"]) if kind == "cond" else None
        tokens = flow.patchify(array("x"))
        compute = lambda: (flow.loss(*flow(tokens, labels=y)),) * 2
        check_adamw(flow, compute, data[key], data[key], FORWARD[run])


@pytest.mark.parametrize("run", ["f32", "f64", "f64_hd16"])
@pytest.mark.parametrize("kind", ["cond", "uncond"])
def test_tarflow_samples(run, kind):
    data = golden("tarflow_tiny.npz")
    options = TARFLOW | {"head_dim": 16 if run == "f64_hd16" else 64}
    options |= {"num_classes": 5} if kind == "cond" else {}
    flow, array = build(options, data, run)
    prefix, checked = f"{run}/{kind}/sample/", 0
    for key in (k for k in data if k.startswith(prefix) and "seq" not in k):
        name = key.removeprefix(prefix)
        plain = kind == "uncond" or name.endswith("ynone")
        call = {"labels": None if plain else torch.from_numpy(data["y"])}
        parts = name.split("_")
        call["guidance"] = float(parts[0][1:])
        if call["guidance"]:
            call |= {"what": parts[1], "annealed": "annealed" in parts}
            call["temperature"] = float(
                name.split("temp")[1].split("_")[0] if "temp" in name else 1
            )
        states, _ = flow.sample(array("z_noise"), **call)
        close(flow.unpatchify(states[-1]), data[key], SAMPLES[run])
        if name == "g0" and f"{prefix}seq_0" in data:
            for i, state in enumerate(states):
                close(flow.unpatchify(state), data[f"{prefix}seq_{i}"], SAMPLES[run])
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("run", ["f32", "f64", "f64_exact_rope"])
def test_starflow_forward(run):
    data = golden("starflow_tiny.npz")
    flow, array = build(STARFLOW, data, run)
    assert {f"params/{k}" for k in flow.state_dict()} == {k for k in data if k[:7] == "params/"}
    tolerance = ROPE_IN_F32 if run == "f64" else FORWARD[run]
    inputs = {"fwd": ("x", 8, (8, 8)), "fwd_rect": ("x_rect", 8, (4, 8)),
              "fwd_wide": ("x_wide", 8, (4, 16)), "fwd_txt5": ("x", 5, (8, 8))}  # fmt: skip
    for name, (x, length, grid) in inputs.items():
        key, image = f"{run}/{name}", array(x).requires_grad_()
        outputs, log_dets = flow(flow.patchify(image), array("y")[:, :length], grid=grid)
        loss = flow.loss(outputs, log_dets)
        sums = sum(d.sum(dim=(1, 2)) for d in log_dets)
        close(flow.unpatchify(outputs[-1], grid), data[f"{key}/z"], tolerance)
        close(loss, data[f"{key}/loss"], tolerance)
        close(sums, data[f"{key}/logdet_sum_per_example"], tolerance)
        if name == "fwd":
            check_gradients(flow, image, loss, data, key, data["param_names"], tolerance)
        for i in range(5 if f"{key}/block_out_0" in data else 0):
            close(outputs[i].reshape(2, *grid, 4), data[f"{key}/block_out_{i}"], tolerance)
            if i < 4:
                close(log_dets[i], data[f"{key}/block_logdet_{i}"], tolerance)
    if f"{run}/adamw_losses" in data:
        tokens = flow.patchify(array("x"))

        def compute():
            outputs, log_dets = flow(tokens, array("y"))
            plain = flow.loss(outputs, log_dets)
            return plain, plain + 1e-4 * sum(o.pow(2).mean() for o in outputs[:-1])

        expected = data[f"{run}/adamw_losses"]
        total = data[f"{run}/adamw_losses_with_latent_reg"]
        check_adamw(flow, compute, expected, total, tolerance)


@pytest.mark.parametrize("run", ["f32", "f64", "f64_exact_rope"])
def test_starflow_samples(run):
    data = golden("starflow_tiny.npz")
    flow, array = build(STARFLOW, data, run)
    tolerance = ROPE_IN_F32 if run == "f64" else SAMPLES[run]
    call = {"text": array("y"), "null_text": array("y_uncond")}
    cases = {"g0": {}, "g2.5": {"guidance": 2.5}, "g0_temp0.8": {"temperature": 0.8},
             "g2.5_temp0.8": {"guidance": 2.5, "temperature": 0.8},
             "g0_rect": {"grid": (4, 8)}}  # fmt: skip
    for name, extra in cases.items():
        grid = extra.get("grid")
        noise = flow.patchify(array("z_noise_rect" if grid else "z_noise"))
        states, _ = flow.sample(noise, **call, **extra)
        close(flow.unpatchify(states[-1], grid), data[f"{run}/sample/{name}"], tolerance)
        if f"{run}/sample/{name}_seq_0" in data:
            for i, state in enumerate(states):
                close(flow.unpatchify(state), data[f"{run}/sample/{name}_seq_{i}"], tolerance)
    noise = flow.patchify(array("z_noise"))
    for size, threshold in ((16, "0.001"), (16, "1e-06"), (16, "0"), (64, "1e-06")):
        key = f"{run}/sample/jacobi_bs{size}_th{threshold}"
        for i, guidance in enumerate((0.0, 2.5)):
            states, passes = flow.sample(
                noise, **call, guidance=guidance, jacobi=(size, float(threshold))
            )
            assert passes == data[f"{key}_iters"][i]
            expected = data[f"{key}_g{guidance:g}"]
            close(flow.unpatchify(states[-1]), expected, tolerance)


@pytest.mark.parametrize("name", ["exp_scale", "noclip", "R2L"])
def test_starflow_variants(name):
    data = golden("starflow_tiny.npz")
    change = {
        "exp_scale": {"use_softplus": 0},
        "noclip": {"soft_clip": 0},
        "R2L": {"seq_order": "R2L"},
    }
    flow, array = build(STARFLOW | change[name], data, "f64")
    outputs, log_dets = flow(flow.patchify(array("x")), array("y"))
    key = f"f64/variant_{name}"
    close(flow.unpatchify(outputs[-1]), data[f"{key}/z"], ROPE_IN_F32)
    close(flow.loss(outputs, log_dets), data[f"{key}/loss"], ROPE_IN_F32)
    states, _ = flow.sample(flow.patchify(array("z_noise")), array("y"))
    close(flow.unpatchify(states[-1]), data[f"{key}/sample_g0"], ROPE_IN_F32)


@pytest.mark.parametrize("name", CASES)
def test_option_cases_are_as_stored_and_invertible(name):
    path = ROOT / "tests" / "golden" / "options_tiny.npz"
    with np.load(path) as stored:
        keys = [key for key in stored.files if key.startswith(f"{name}/")]
        expected = {key.removeprefix(f"{name}/"): stored[key] for key in keys}
    arrays = compute(name)
    assert sorted(arrays) == sorted(expected)
    options = json.loads(str(expected["options"]))
    assert options == CASES[name][0]
    for key in set(expected) - {"options"}:
        assert arrays[key].dtype == expected[key].dtype
        close(arrays[key], expected[key], 1e-12)
    flow = torch_flow.Flow(options).double()
    weights = {k[7:]: torch.from_numpy(v) for k, v in expected.items() if k.startswith("params/")}
    assert set(weights) == {k for k, _ in flow.named_parameters()}
    flow.load_state_dict(weights, strict=False)
    text = torch.from_numpy(expected["text"]) if "text" in expected else None
    grid = expected["grid"]
    back, _ = flow.sample(torch.from_numpy(expected["z"]), text=text, grid=grid)
    close(back[-1], expected["x"], 1e-10)
    close(flow.patchify(torch.from_numpy(expected["x_image"])), expected["x"], 0)
    close(flow.unpatchify(torch.from_numpy(expected["z"]), grid), expected["z_image"], 0)


def test_reference_covers_tarflow_with_labels():
    options = dict(in_channels=2, img_size=4, patch_size=2, channels=16, num_blocks=2,
                   layers_per_block=1, head_dim=8, num_classes=3)  # fmt: skip
    arrays = torch_flow.reference(options, seed=0)
    assert arrays["params/blocks.1.class_embed"].shape == (3, 1, 16)
    assert arrays["x"].shape == arrays["sample"].shape == (2, 4, 8)
    assert arrays["sample_image"].shape == (2, 2, 4, 4)
    assert np.abs(arrays["sample_guided"] - arrays["sample"]).max() > 1e-3
    close(torch_flow.reference(options, seed=0)["z"], arrays["z"], 0)
    assert np.abs(torch_flow.reference(options, seed=1)["z"] - arrays["z"]).max() > 1e-3


def test_published_sizes():
    """Parameter counts of the two timed models and of the released 3B one, and its key count."""
    released = torch_flow.TIMED["starflow"] | dict(
        in_channels=4, img_size=32, channels=3072, num_blocks=6, txt_size=128, txt_dim=2048,
        layers_per_block="2 2 2 2 2 24",
    )  # fmt: skip
    with torch.device("meta"):
        flows = [torch_flow.Flow(o) for o in (*torch_flow.TIMED.values(), released)]
    counts = [sum(p.numel() for p in flow.parameters()) for flow in flows]
    assert counts == [12_936_288, 44_629_696, 3_858_281_544]
    assert len(flows[-1].state_dict()) == 455


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="use_softplush"):
        torch_flow.Flow(TARFLOW | {"use_softplush": 1})


@pytest.mark.parametrize(
    "row", ["train_tarflow", "train_starflow", "sample_tarflow --guidance 1.5",
            "sample_starflow --batch 2 --guidance 2.5 --jacobi"]
)  # fmt: skip
def test_timing_rows_print_one_json_object(row, monkeypatch, capsys):
    small = dict(channels=64, num_blocks=2, layers_per_block=1)
    sizes = {"tarflow": dict(img_size=4), "starflow": dict(img_size=4, txt_size=2, txt_dim=8)}
    for family, size in sizes.items():
        options = torch_flow.TIMED[family] | small | size
        monkeypatch.setitem(torch_flow.TIMED, family, options)
    arguments = f"torch_flow.py --repeats 2 --row {row}".split()
    monkeypatch.setattr(sys, "argv", arguments)
    torch_flow.main()
    row = json.loads(capsys.readouterr().out)
    assert row["row"] == arguments[4]
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
