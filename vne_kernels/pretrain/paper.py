"""The paper's own numbers, for comparison with what is measured here.

Source: "Formulating A Non-contrastive Loss As A Difference Of Entropies Using A Von Neumann Entropy
Bound", submitted to ICLR 2022. Accuracies are Top-1 of the linear evaluation, %, of a ResNet-50.
"""

from __future__ import annotations

from pathlib import Path

from vne_kernels.pretrain.config import Config

BATCH_SIZES = (16, 32, 64, 128)
EPOCHS = (25, 50, 100)
DATA = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet10": "ImageNet-10",
    "imagenet100": "ImageNet-100",
}
#: Figure 2: CIFAR-10 after 100 epochs of batches of 128.
FIGURE_2 = {"simclr": 85.0, "shannon-doe": 26.6, "vn-doe": 88.3}

# "?" marks numbers that the copy of the paper does not show legibly.
_TABLE_1A = """
epochs loss    cifar10              cifar100             imagenet10           imagenet100
25     simclr  73.6 73.8 73.5 68.7  43.2 44.4 40.3 39.3  65.4 63.4 63.6 65.4  63.1 64.7 66.7 65.9
25     simsiam 49.6 49.9 63.4 63.1  12.8 25.3 27.5 34.1  43.0 49.0 49.2 53.2  37.1 49.5 50.7 56.5
25     vn-doe  76.1 76.3 75.2 74.6  48.1 51.1 49.7 49.1  65.4 70.4 69.6 69.0  64.6 67.8 69.6 70.4
50     simclr  ?    79.7 79.0 79.7  47.7 49.5 49.1 50.1  70.8 70.0 70.0 69.0  ?    71.1 72.1 72.8
50     simsiam 52.4 62.8 74.4 74.2  24.5 33.9 38.2 35.7  52.8 51.4 56.2 56.4  26.9 31.4 44.4 65.0
50     vn-doe  80.4 81.9 82.1 81.7  53.3 56.7 58.1 57.7  73.2 72.8 75.2 74.4  69.0 74.2 76.0 76.1
100    simclr  81.8 82.8 83.6 85.0  52.2 55.8 57.2 59.3  77.4 77.6 77.4 78.4  68.6 77.6 77.9 78.4
100    simsiam 63.8 69.4 79.3 80.7  30.4 32.8 40.4 47.2  59.8 63.2 62.0 66.0  24.7 29.7 54.5 68.1
100    vn-doe  84.2 87.2 88.2 88.3  56.2 61.9 62.0 63.3  77.6 80.8 81.0 82.2  70.3 79.9 81.2 82.0
"""


def data_name(config: Config) -> str:
    """What a run's images are called: a list of classes, or the name of a file or data set."""
    return Path(config.classes or config.data).stem


def table_1a(data: str) -> dict[tuple[str, int], dict[int, float]]:
    """(loss, epochs) -> batch size -> accuracy in %; empty where the paper has no such ``data``."""
    header, *lines = (line.split() for line in _TABLE_1A.strip().splitlines())
    if data not in header[2:]:
        return {}
    first = 2 + header[2:].index(data) * len(BATCH_SIZES)
    return {
        (loss, int(epochs)): {
            batch_size: float(value)
            for batch_size, value in zip(BATCH_SIZES, values[first - 2 :], strict=False)
            if value != "?"
        }
        for epochs, loss, *values in lines
    }
