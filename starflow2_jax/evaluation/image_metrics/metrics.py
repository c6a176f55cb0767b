"""Fréchet distance, CLIP score, and precision and recall of generated images.

N or M images, D features.
"""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from starflow2_jax.evaluation.image_metrics import networks
from starflow2_jax.evaluation.image_metrics.networks import MISSING, Clip

NEIGHBORS = 3  # of the manifold of precision and recall, as in ADM's evaluator
_ROWS = 1024  # of distances that are held at a time


def frechet_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of features, [N, D] and [M, D], by torchmetrics.

    Raises:
        ValueError: A set has fewer than two rows.
    """
    if min(len(generated), len(real)) < 2:
        raise ValueError("Fréchet distance: at least two images of each kind are needed")
    try:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ValueError(MISSING.format("torchmetrics")) from error
    network = torch.nn.Identity()
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(torch.from_numpy(np.asarray(real, np.float64)), real=True)
    metric.update(torch.from_numpy(np.asarray(generated, np.float64)), real=False)
    return float(metric.compute())


def clip_score(
    clip: Clip, images: np.ndarray, captions: Sequence[str], batch_size: int = 32
) -> float:
    """Return the CLIP score of images uint8 [N, H, W, 3] and their captions, by torchmetrics.

    It is 100 times the mean cosine of image and text, and at least 0. Captions of more tokens than
    CLIP reads are cut.
    """
    try:
        import torch
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError as error:
        raise ValueError(MISSING.format("torchmetrics")) from error
    metric = CLIPScore(model_name_or_path=lambda: clip)
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = np.ascontiguousarray(images[start : start + batch_size].transpose(0, 3, 1, 2))
            rows = [*torch.from_numpy(batch)]
            metric.update(rows, list(captions[start : start + batch_size]))
    return float(metric.compute())


def precision_recall(
    generated: np.ndarray, real: np.ndarray, neighbors: int = NEIGHBORS
) -> dict[str, float]:
    """Return precision and recall of features [N, D] and [M, D] (arXiv 1904.06991).

    The manifold of a set is the union of a ball around every row, up to its k-th nearest neighbor.
    Precision is the share of generated images in the manifold of the real ones, recall the share of
    real images in that of the generated ones.

    Raises:
        ValueError: A set has at most `neighbors` rows.
    """
    if min(len(generated), len(real)) <= neighbors:
        raise ValueError(
            f"precision and recall: more than {neighbors} images of each kind are needed"
        )
    return {
        "precision": _share_inside(generated, real, _radii(real, neighbors)),
        "recall": _share_inside(real, generated, _radii(generated, neighbors)),
    }


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared Euclidean distances [N, M]."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _radii(rows: np.ndarray, neighbors: int) -> np.ndarray:
    """Return the squared distance of every row to its k-th nearest neighbor [N]."""
    parts = []
    for start in range(0, len(rows), _ROWS):
        squares = _squared_distances(rows[start : start + _ROWS], rows)
        # The nearest row is the row itself.
        parts.append(np.partition(squares, neighbors, axis=1)[:, neighbors])
    return np.concatenate(parts)


def _share_inside(rows: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> float:
    inside = [
        (_squared_distances(rows[start : start + _ROWS], centers) <= radii[None]).any(1)
        for start in range(0, len(rows), _ROWS)
    ]
    return float(np.concatenate(inside).mean())


def protocol(inception: str | None, clip: str | None) -> dict[str, Any]:
    """Describe the numbers; those of other packages and other resizing cannot be compared."""
    files = {"inception": inception, "clip": clip and str(Path(clip) / "config.json")}
    return {
        "weights": {
            name: {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            for name, path in files.items()
            if path
        },
        "frechet_distance": "torchmetrics FrechetInceptionDistance in float64, uint8 images scaled "
        "to 299 x 299 without antialiasing, 2048 features",
        "precision, recall": f"same features, {NEIGHBORS} nearest neighbors (arXiv 1904.06991)",
        "clip_score": "torchmetrics CLIPScore, 100 times the mean cosine, at least 0",
        "real_images": "ADM's center crop to the side of the generated ones",
        "versions": {name: _version(name) for name in ("torch", "torchmetrics", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    generated: np.ndarray,
    real: np.ndarray,
    captions: Sequence[str] | None,
    *,
    inception: Any = None,
    clip: Clip | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the metrics of images uint8 [N, H, W, 3] and [M, H, W, 3], and what was not measured.

    Args:
        generated: the images of a model.
        real: the images to compare them with.
        captions: of the generated images, None if they have none.
        inception: a network of `networks.open_inception`, or another one.
        clip: of `networks.open_clip`.
    """
    figures: dict[str, Any] = {"images": len(generated), "real_images": len(real)}
    missing: dict[str, str] = {}
    if inception is None:
        missing["frechet_distance, precision, recall"] = "no weights; name them with --inception"
    else:
        rows = [networks.features(inception, images) for images in (generated, real)]
        figures["frechet_distance"] = frechet_distance(*rows)
        figures |= precision_recall(*rows)
    if clip is None:
        missing["clip_score"] = "no CLIP; name its folder with --clip"
    elif captions is None:
        missing["clip_score"] = "the images have no captions"
    else:
        figures["clip_score"] = clip_score(clip, generated, captions)
        if len(real) == len(generated):
            figures["clip_score_of_real_images"] = clip_score(clip, real, captions)
    return figures, missing
