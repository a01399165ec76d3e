"""The smallest run of ``vne-pretrain`` that does everything: what several test files train."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# fp32: bf16 would be chosen by a measurement. One epoch is 40 // 8 = 5 steps.
SMALL = ["--backbone", "resnet18", "--precision", "32-true", "--accelerator", "cpu"]
SMALL += ["--batch-size", "8", "--projector-dim", "16"]
STEPS_PER_EPOCH = 5


def write_npz(path: Path) -> Path:
    """40 training and 12 test images of four classes, each class its own brightness."""
    random = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 40), ("test", 12)):
        labels = np.arange(count) % 4
        noise = random.integers(0, 60, (count, 8, 8))
        images = noise + 60 * labels[:, None, None]
        content[f"{part}_images"] = images.astype(np.uint8)
        content[f"{part}_labels"] = labels[:, None].astype(np.uint8)  # (N, 1), as MedMNIST
    np.savez(path, **content)
    return path


def write_noise(path: Path, count: int) -> Path:
    """``count`` training and 8 test images of nothing, of four classes."""
    random = np.random.default_rng(0)
    content = {}
    for part, images in (("train", count), ("test", 8)):
        content[f"{part}_images"] = random.integers(0, 256, (images, 8, 8), dtype=np.uint8)
        content[f"{part}_labels"] = (np.arange(images) % 4).astype(np.uint8)
    np.savez(path, **content)
    return path
