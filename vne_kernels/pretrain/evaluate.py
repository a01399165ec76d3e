"""How good are the encoder's features? Frozen, judged by probes that see the training labels.

Every score is the accuracy on all test images. With all labels of an easy set even random features
come close to the best, so the probes are also fitted with a few labels per class, where the
features have to bring the classes together; the mean over several fixed draws is what is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vne_kernels.pretrain.data import ImageSet

FEW_LABELS = 10  # per class
DRAWS = 5
NEIGHBOURS = 5
INVERSE_PENALTY = 0.1  # sklearn's C; fixed, so that nothing is tuned on the test set
ENCODE_BATCH = 256

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class PlainImages(Dataset[Tensor]):
    def __init__(self, images: ImageSet, view: v2.Compose) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        view: Tensor = self.view(self.images[index])
        return view


def plain_batches(images: ImageSet, view: v2.Compose, workers: int) -> Iterator[Tensor]:
    """The images as the probes see them, (<= 256, 3, size, size) at a time."""
    return iter(DataLoader(PlainImages(images, view), ENCODE_BATCH, num_workers=workers))


@torch.no_grad()
def encode(
    encoder: nn.Module, images: Iterator[Tensor], device: torch.device, bf16: bool
) -> Features:
    """(N, features), in evaluation mode and in the precision of the training."""
    encoder = encoder.to(device).eval()
    parts = []
    for batch in images:
        batch = batch.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            parts.append(encoder(batch).float().cpu())
    return torch.cat(parts).numpy()


def scores(
    train: Features, train_labels: Labels, test: Features, test_labels: Labels
) -> dict[str, float]:
    """Linear probe and k nearest neighbours (cosine), with all labels and with a few."""
    few: dict[str, list[float]] = {"linear_probe": [], "knn": []}
    for draw in range(DRAWS):
        chosen = few_per_class(train_labels, FEW_LABELS, draw)
        for name, score in _fit_and_score(
            train[chosen], train_labels[chosen], test, test_labels
        ).items():
            few[name].append(score)
    whole = _fit_and_score(train, train_labels, test, test_labels)
    return whole | {f"{name}_{FEW_LABELS}_labels": float(np.mean(few[name])) for name in few}


def few_per_class(labels: Labels, count: int, draw: int) -> npt.NDArray[np.int64]:
    """Indices of ``count`` images of every class (all of them, where it has fewer)."""
    random = np.random.default_rng(draw)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([random.choice(c, min(count, len(c)), replace=False) for c in classes])


def _fit_and_score(
    train: Features, train_labels: Labels, test: Features, test_labels: Labels
) -> dict[str, float]:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=300))
    neighbours = KNeighborsClassifier(
        min(NEIGHBOURS, len(train)), metric="cosine", weights="distance"
    )
    with warnings.catch_warnings():
        # On large sets the last digits of the probe's optimum are not worth the time.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(train, train_labels)
    neighbours.fit(train, train_labels)
    return {
        "linear_probe": float(probe.score(test, test_labels)),
        "knn": float(neighbours.score(test, test_labels)),
    }
