"""The networks whose features images are compared in, with weights from the user's own files.

Requires the extra `metrics`. Nothing is downloaded.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from starflow2_jax.checkpoints import tensor_files

if TYPE_CHECKING:
    from torch import nn

# Images uint8 [B, H, W, 3] -> features float64 [B, D].
FeatureFn = Callable[[np.ndarray], np.ndarray]
# CLIP's model and processor.
Clip = tuple[Any, Any]

MISSING = "{} is not installed: pip install 'starflow2_jax[metrics]'"


def open_inception(path: str) -> "nn.Module":
    """Return the Inception v3 of the original FID, with 2048 features of its last pooling.

    Args:
        path: weights in the format of torch-fidelity (`weights-inception-2015-12-05-*.pth`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds other weights or more than tensors, or a package is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--inception {path}: there is no such file of weights")
    try:
        import torch
        import torch_fidelity  # noqa: F401 - torchmetrics would hide why it cannot be imported
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ValueError(MISSING.format("torchmetrics or torch-fidelity")) from error
    except RuntimeError as error:  # of torchvision
        raise ValueError(
            f"torch-fidelity cannot be imported ({error}): install the torchvision that belongs to "
            "this torch, such as both from one index of PyTorch's"
        ) from error
    # torch-fidelity would run code that a file holds: it gets a copy of the tensors alone.
    tensors = tensor_files.open_source(path)
    state = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        # Without antialiasing images are scaled as in the original implementation.
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], buffer, antialias=False)
    except RuntimeError as error:  # names or shapes of tensors
        lines = [line.strip()[:200] for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"--inception {path}: not the Inception v3 of the original FID; expected "
            f"torch-fidelity's weights-inception-2015-12-05-6726825d.pth: {' '.join(lines)}"
        ) from error


def open_clip(path: str) -> Clip:
    """Return a CLIP model and its processor from a folder in Hugging Face's format."""
    if not Path(path, "config.json").is_file():
        raise FileNotFoundError(f"--clip {path}: there is no config.json in this folder")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise ValueError(MISSING.format("torch")) from error
    import torch

    class Features(torch.nn.Module):
        """CLIP as torchmetrics 1.9 calls it: transformers 5 wraps the features in an output."""

        def __init__(self, model: CLIPModel):
            super().__init__()
            self.model, self.config = model, model.config

        def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
            features = self.model.get_image_features(*args, **kwargs)
            return getattr(features, "pooler_output", features)

        def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
            features = self.model.get_text_features(*args, **kwargs)
            return getattr(features, "pooler_output", features)

    clip = CLIPModel.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = Features(clip)
    processor = CLIPProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    max_tokens = model.config.text_config.max_position_embeddings

    def process(**inputs: Any) -> Any:
        """Cut long captions before their end token; torchmetrics would cut that as well."""
        if inputs.get("text") is not None:
            inputs |= {"truncation": True, "max_length": max_tokens}
        return processor(**inputs)

    return model.eval(), process


def features(network: "nn.Module", images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Return a network's features, float64 [N, D], of images uint8 [N, H, W, 3]."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2))
            rows = network(torch.from_numpy(batch))
            parts.append(rows.reshape(len(batch), -1).double().numpy())
    return np.concatenate(parts)
