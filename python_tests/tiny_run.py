"""The smallest run of ``vne-pretrain`` that does everything: what several test files train."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

# fp32: bf16 would be chosen by a measurement. One epoch is 40 // 8 = 5 steps.
SMALL = ["--backbone", "resnet18", "--precision", "32-true", "--accelerator", "cpu"]
SMALL += ["--batch-size", "8", "--projector-dim", "16"]
STEPS_PER_EPOCH = 5


def write_npz(
    path: Path, test: int = 12, classes: int = 4, step: int = 60, spacing: int = 1
) -> Path:
    """40 training and ``test`` test images, each class its own brightness.

    Labels are ``spacing`` apart.
    """
    random = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 40), ("test", test)):
        labels = np.arange(count) % classes
        noise = random.integers(0, 60, (count, 8, 8))
        content[f"{part}_images"] = (noise + step * labels[:, None, None]).astype(np.uint8)
        content[f"{part}_labels"] = (spacing * labels[:, None]).astype(np.uint8)  # as MedMNIST
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


def write_folder(path: Path, counts: dict[str, int], size: int = 20) -> None:
    """Folders of so many images of nothing."""
    random = np.random.default_rng(1)
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def flip_a_byte(path: Path) -> None:
    """In the middle of a file, which may be a link to another run's."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
