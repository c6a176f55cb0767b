"""Import torch-fidelity without torchvision, which its Inception and torchmetrics do not need.

PyPI's torchvision cannot be imported next to a CPU build of torch.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import pytest

MODULES = ("", ".datasets", ".models", ".transforms", ".transforms.functional")


@pytest.fixture(autouse=True, scope="session")
def torch_fidelity():
    """Return torch-fidelity, None where it is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return None
    names = [f"torchvision{name}" for name in MODULES]
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in names:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__getattr__ = lambda attribute: mock.MagicMock()
        importlib.import_module("torch_fidelity")
        for name in names:
            del sys.modules[name]
    return importlib.import_module("torch_fidelity")
