"""How good are the encoder's features? Frozen, judged by probes that see the training labels.

Every score is the accuracy on all test images. With all labels of an easy set even random features
come close to the best, so the probes are also fitted with a few labels per class, where the
features have to bring the classes together; the score is the mean over several fixed draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightly.utils.benchmarking.knn import knn_predict  # type: ignore[import-untyped]
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from vne_kernels.common.reading import FileError, read_tensors
from vne_kernels.pretrain.config import Config, OptionError
from vne_kernels.pretrain.data import (
    ImageSet,
    leave_interrupts_to_the_main_process,
    stratified,
)
from vne_kernels.pretrain.model import make_encoder

FEW_LABELS = 10  # per class
DRAWS = 5
NEIGHBOURS = 5
INVERSE_PENALTY = 0.1  # sklearn's C; fixed, so that nothing is tuned on the test set
ENCODE_BATCH = 256
#: Training images of the scikit-learn probes: their time grows faster than the set.
PROBE_IMAGES = 50_000
#: Similarities and votes of one chunk of :func:`weighted_knn`: 256 MiB in float32.
KNN_CHUNK = 2**26

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Encoded(NamedTuple):
    """Features (n, f) of the images that could be read, and their labels (n,)."""

    features: Features
    labels: Labels


class PlainImages(Dataset["tuple[int, Tensor] | None"]):
    """(index, view) of every image; None for one that cannot be read."""

    def __init__(self, images: ImageSet, view: v2.Compose) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | None:
        try:
            image = self.images[index]
        except FileError:
            return None
        return index, self.view(image)


def _readable(samples: Sequence[tuple[int, Tensor] | None]) -> tuple[list[int], Tensor | None]:
    """Indices and (n, 3, size, size) of a batch's readable images; None where there are none."""
    read = [sample for sample in samples if sample is not None]
    return [index for index, _ in read], torch.stack([x for _, x in read]) if read else None


def encode(
    encoder: nn.Module,
    images: ImageSet,
    view: v2.Compose,
    device: torch.device,
    *,
    bf16: bool,
    workers: int,
    progress: str | None = None,
) -> Encoded:
    """Features of the images as ``view`` shows them; those that cannot be read are left out.

    ``progress``: title of a progress bar; None: no bar.

    Raises:
        OptionError: not one image can be read.
    """
    encoder = encoder.to(device).eval()
    loader = DataLoader(
        PlainImages(images, view),
        ENCODE_BATCH,
        num_workers=workers,
        collate_fn=_readable,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    features: Features | None = None
    encoded: list[int] = []
    for indices, batch in tqdm(loader, progress, leave=False, disable=progress is None):
        if batch is None:
            continue
        part = encode_batch(encoder, batch, device, bf16=bf16).cpu().numpy()
        if features is None:  # all at once: joining the parts would hold them twice
            features = np.empty((len(images), part.shape[1]), np.float32)
        features[len(encoded) : len(encoded) + len(indices)] = part
        encoded += indices
    if features is None:
        got = f"{len(images)} images, none of which can be read"
        raise OptionError("data", "a set of images that can be read", got)
    return Encoded(features[: len(encoded)], images.labels[encoded])


@torch.no_grad()
def encode_batch(encoder: nn.Module, batch: Tensor, device: torch.device, *, bf16: bool) -> Tensor:
    """(n, 3, h, w) -> (n, f) float32, by an encoder that is in evaluation mode."""
    batch = batch.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        features: Tensor = encoder.forward(batch)  # not compiled: a shape and mode of its own
    return features.float()


def trained_encoder(run: Path, config: Config) -> nn.Module:
    """The encoder that the run in the folder ``run`` has trained.

    Raises:
        OptionError: there is no ``encoder.pt`` (the run has not ended), or it cannot be used.
    """
    path = run / "encoder.pt"
    if not path.is_file():
        raise OptionError("run", f"the folder of a run that has ended, with {path.name}", str(run))
    encoder = make_encoder(config.backbone, config.stem)
    try:
        encoder.load_state_dict(read_tensors(path))
    except (ValueError, RuntimeError) as error:
        got = f"{path} ({' '.join(str(error).split())[:120]})"
        wanted = f"the folder of a run whose {path.name} holds a {config.backbone}"
        raise OptionError("run", wanted, got) from error
    return encoder


def untrained_encoder(config: Config) -> nn.Module:
    """The encoder as the run began with it: a function of the seed alone.

    Its batch norms are as initialised: with the images' own statistics its scores are far worse,
    and it is to be a fair rival.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_encoder(config.backbone, config.stem)


def probe_subset(images: ImageSet) -> ImageSet:
    """The images that the scikit-learn probes learn from: all, or a stratified 50,000 of more."""
    if len(images) <= PROBE_IMAGES:
        return images
    return images.take(stratified(images.labels, PROBE_IMAGES))


def weighted_knn(
    train: Encoded, test: Encoded, *, neighbours: int, temperature: float, device: torch.device
) -> float:
    """Accuracy of the vote of the ``neighbours`` nearest training images, each exp(cosine / T).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
    2018, as lightly computes it. Labels must be 0, 1, ...
    """
    bank = F.normalize(torch.from_numpy(train.features).to(device)).T
    labels = torch.from_numpy(train.labels).to(device)
    classes = int(train.labels.max()) + 1
    chunk = max(1, KNN_CHUNK // max(len(train.labels), neighbours * classes))
    right = 0
    for features, wanted in zip(
        torch.split(torch.from_numpy(test.features), chunk),
        torch.split(torch.from_numpy(test.labels), chunk),
        strict=True,
    ):
        found = knn_predict(
            F.normalize(features.to(device)), bank, labels, classes, neighbours, temperature
        )[:, 0]
        right += int((found.cpu() == wanted).sum())
    return right / len(test.labels)


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
