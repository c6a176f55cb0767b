"""The Inception of the Fréchet distance, from files in the format of torch-fidelity."""

import importlib.util
import sys

import numpy as np
import pytest

from starflow2_jax.evaluation.image_metrics import networks

torch = pytest.importorskip("torch", reason="needs the extra [metrics]")
for package in ("torchmetrics", "torch_fidelity"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the extra [metrics]: no {package}", allow_module_level=True)

FILE = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture
def network(torch_fidelity, tmp_path, monkeypatch):
    """Return a random Inception; its tensors are in the file."""
    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    kind = torch_fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception-v3-compat", ["2048"], str(empty))
    torch.save(network.state_dict(), tmp_path / FILE)
    return network


def test_features_are_those_of_the_stored_network(network, tmp_path):
    loaded = networks.open_inception(str(tmp_path / FILE))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    features = networks.features(loaded, images, batch_size=2)
    expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0]
    assert features.shape == (3, 2048) and features.std(0).max() > 0
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-6)


class Code:
    """An object whose unpickling runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_other_files_are_refused(tmp_path):
    weight = torch.zeros(32, 3, 3, 3)
    for name, content, message in (
        ("other", {"layer.weight": weight}, r"Missing key.*Conv2d_1a_3x3.*Unexpected key.*layer"),
        ("shape", {"fc.weight": torch.zeros(1000, 2048)}, r"size mismatch for fc\.weight"),
        ("list", [weight], "holds a list; expected a state_dict"),
        ("code", {"a": Code(tmp_path / "written")}, "more than tensors and is refused"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=rf"(?s){name}\.pth.*{message}"):
            networks.open_inception(str(tmp_path / f"{name}.pth"))
    (tmp_path / "text.pth").write_text("not found")
    with pytest.raises(ValueError, match=r"text\.pth is damaged"):
        networks.open_inception(str(tmp_path / "text.pth"))
    assert not (tmp_path / "written").exists()


def test_a_torchvision_of_another_torch_is_named(tmp_path, monkeypatch):
    (tmp_path / FILE).touch()

    class Broken:
        def find_spec(self, name, *rest):
            if name == "torch_fidelity":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match=r"nms does not exist.*torchvision that belongs to"):
        networks.open_inception(str(tmp_path / FILE))
