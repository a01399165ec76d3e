"""Weighted nearest neighbours on the frozen features of a run (Wu et al. 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vne_kernels.common.files import write_json
from vne_kernels.pretrain import environment
from vne_kernels.pretrain.config import load_config
from vne_kernels.pretrain.disk import held
from vne_kernels.pretrain.evaluate import weighted_knn
from vne_kernels.pretrain.frozen import Frozen
from vne_kernels.pretrain.protocol import KNNProtocol, Setting


def evaluate(
    run: Path, protocol: KNNProtocol | None = None, setting: Setting | None = None
) -> dict[str, Any]:
    """Test accuracy (0 to 1) of the encoder of the run in the folder ``run``; writes ``knn.json``.

    Raises:
        OptionError: the run, the images or the accelerator cannot be used, or the folder cannot be
            written to.
    """
    protocol, setting = protocol or KNNProtocol(), setting or Setting()
    load_config(run)  # what is wrong with the folder is said before it is written to
    with held("run", run, setting.file_stem("knn")):
        return _evaluate(run, protocol, setting)


def _evaluate(run: Path, protocol: KNNProtocol, setting: Setting) -> dict[str, Any]:
    subject = Frozen.open(run, setting)
    train = subject.encode(subject.data.train, "encoding training images")
    test = subject.encode(subject.data.test, "encoding test images")
    neighbours = min(protocol.neighbours, len(train.labels))
    accuracy = weighted_knn(
        train,
        test,
        neighbours=neighbours,
        temperature=protocol.temperature,
        device=subject.device,
    )
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "neighbours": neighbours,
        "temperature": protocol.temperature,
        "broken_images": {
            "train": len(subject.data.train) - len(train.labels),
            "test": len(subject.data.test) - len(test.labels),
        },
        **subject.describe(),
        "environment": environment.describe(subject.device),
    }
    write_json(run / f"{setting.file_stem('knn')}.json", result)
    return result
