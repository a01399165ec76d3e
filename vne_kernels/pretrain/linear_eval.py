"""The paper's linear evaluation (Appendix C): a linear classifier on frozen features, by SGD.

The loop is a plain one: it can stop and go on at any step, and Lightning's trainer would add 1.7 ms
to each (measured on a CPU), about a third of what a step on cached features takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2
from tqdm import tqdm

from vne_kernels.common.files import atomic_write, write_json
from vne_kernels.common.reading import first_sentence, read_tensors
from vne_kernels.pretrain import environment
from vne_kernels.pretrain.callbacks import Table
from vne_kernels.pretrain.checkpoints import difference, form, form_of
from vne_kernels.pretrain.config import CHECKPOINT_SECONDS, OptionError, load_config
from vne_kernels.pretrain.data import (
    TwoViews,
    as_is,
    leave_interrupts_to_the_main_process,
)
from vne_kernels.pretrain.disk import Disk, held
from vne_kernels.pretrain.evaluate import Encoded
from vne_kernels.pretrain.frozen import Frozen
from vne_kernels.pretrain.protocol import LinearProtocol, Setting

TOP = 5  # the second accuracy, where there are more classes than that
TEST_BATCH = 4096

Batches = Iterator[tuple[Tensor, Tensor]]


def evaluate(
    run: Path, protocol: LinearProtocol | None = None, setting: Setting | None = None
) -> dict[str, Any]:
    """Train and test the linear probe on the encoder of the run in the folder ``run``.

    Features are those of the plain view, computed once; with ``protocol.augment`` those of a random
    crop, perhaps flipped, new in each epoch. Test features are always those of the plain view.
    Writes ``linear_eval.json`` (returned) and ``linear_eval.csv`` (a row per epoch) into the
    folder; after a Ctrl-C the state is in ``linear_eval.ckpt``, from which the same call
    continues.

    Returns:
        ``accuracy`` (and ``top5_accuracy`` where there are more than five classes): test accuracy,
        0 to 1, after the last epoch, whatever the epochs before it reached; and what it was
        measured with.

    Raises:
        OptionError: the run, the images or the accelerator cannot be used, or the evaluation in
            ``linear_eval.ckpt`` was begun with another protocol.
        KeyboardInterrupt: Ctrl-C; the checkpoint has been written.
    """
    protocol, setting = protocol or LinearProtocol(), setting or Setting()
    load_config(run)  # what is wrong with the folder is said before it is written to
    with held("run", run, setting.file_stem("linear_eval")):
        return _evaluate(run, protocol, setting)


def _evaluate(run: Path, protocol: LinearProtocol, setting: Setting) -> dict[str, Any]:
    start = time.monotonic()
    subject = Frozen.open(run, setting)
    stem = setting.file_stem("linear_eval")
    checkpoint = Checkpoint(run / f"{stem}.ckpt", protocol, subject)
    test = subject.encode(subject.data.test, "encoding test images")
    if protocol.augment:
        images, train = len(subject.data.train), None
    else:
        train = subject.encode(subject.data.train, "encoding training images")
        images = len(train.labels)
    probe = Probe(test.features.shape[1], subject.data.classes, images, protocol, subject.device)
    checkpoint.restore(probe)
    order = batches(images, protocol.batch_size, protocol.seed, range(probe.step, probe.steps))
    stream = (
        augmented(subject, order, protocol.seed, probe.broken)
        if train is None
        else cached(train, order)
    )
    table = Table(run / f"{stem}.csv", probe.header, Disk())
    (run / f"{stem}.json").unlink(missing_ok=True)  # of an earlier evaluation, as the table's rows
    rows = table.keep_until(probe.step)
    rows += fit(probe, stream, test, table, checkpoint)
    last = dict(zip(probe.header, rows[-1], strict=True))
    result: dict[str, Any] = {
        "accuracy": last["test_top1"],
        **({f"top{TOP}_accuracy": last[f"test_top{TOP}"]} if probe.has_top else {}),
        "measured": f"test images, after the last of {protocol.epochs} epochs",
        "features": "random crop and flip" if protocol.augment else "plain view",
        "dimension": test.features.shape[1],
        "protocol": dataclasses.asdict(protocol),
        "broken_images": {
            "train": len(probe.broken) if train is None else len(subject.data.train) - images,
            "test": len(subject.data.test) - len(test.labels),
        },
        **subject.describe(),
        "environment": environment.describe(subject.device),
        "seconds_of_this_process": round(time.monotonic() - start, 2),
    }
    write_json(run / f"{stem}.json", result)
    checkpoint.path.unlink(missing_ok=True)
    return result


class Probe(nn.Module):
    """The classifier with its optimiser, schedule and the metrics of the epoch in hand."""

    def __init__(
        self,
        features: int,
        classes: int,
        images: int,
        protocol: LinearProtocol,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.steps_per_epoch = math.ceil(images / protocol.batch_size)
        self.steps = protocol.epochs * self.steps_per_epoch
        self.step = 0
        self.broken: set[str] = set()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(protocol.seed)
            self.linear = nn.Linear(features, classes)
        self.has_top = classes > TOP
        names = {"top1": 1, f"top{TOP}": TOP} if self.has_top else {"top1": 1}
        self.accuracies = MetricCollection(
            {
                name: MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False)
                for name, k in names.items()
            },
            # Groups are made of metrics whose states agree after one batch, which may be chance.
            compute_groups=False,
        )
        self.loss = MeanMetric(nan_strategy="disable")
        self.loss.persistent(True)
        self.accuracies.persistent(True)
        self.to(device)
        self.optimizer = torch.optim.SGD(
            self.linear.parameters(),
            lr=protocol.lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
        )
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=self.steps)

    @property
    def header(self) -> list[str]:
        names = [f"{part}_{name}" for part in ("train", "test") for name in self.accuracies]
        return ["epoch", "step", "lr", "loss", *names]

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """One step on features (n, f) and labels (n,), of any device."""
        device = self.linear.weight.device
        features, labels = features.to(device), labels.to(device)
        logits = self.linear(features)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.optimizer.zero_grad()
        losses.mean().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.loss.update(losses.detach())
        self.accuracies.update(logits.detach(), labels)

    def end_epoch(self, test: Encoded) -> list[float]:
        """The epoch's row of the table: means while it trained, and the test at its end."""
        epoch = self.step // self.steps_per_epoch
        row = [epoch, self.step, float(self.schedule.get_last_lr()[0]), float(self.loss.compute())]
        row += self._accuracies()
        self._reset()
        features, labels = (torch.split(torch.from_numpy(x), TEST_BATCH) for x in test)
        with torch.no_grad():
            for x, y in zip(features, labels, strict=True):
                device = self.linear.weight.device
                self.accuracies.update(self.linear(x.to(device)), y.to(device))
        row += self._accuracies()
        self._reset()
        return row

    def _accuracies(self) -> list[float]:
        return [float(x) for x in self.accuracies.compute().values()]

    def _reset(self) -> None:
        self.loss.reset()
        self.accuracies.reset()


def fit(
    probe: Probe, stream: Batches, test: Encoded, table: Table, checkpoint: Checkpoint
) -> list[list[float]]:
    """Train the probe to its last step; returns the rows written, one per epoch that ended."""
    rows: list[list[float]] = []
    saved_at = time.monotonic()
    bar = tqdm(stream, "linear probe", probe.steps, initial=probe.step, unit="step")
    with bar, FirstInterrupt() as interrupt:
        for features, labels in bar:
            probe.learn(features, labels)
            if probe.step % probe.steps_per_epoch == 0:
                rows.append(probe.end_epoch(test))
                table.append(rows[-1:])
                top1 = dict(zip(probe.header, rows[-1], strict=True))["test_top1"]
                bar.set_postfix(epoch=int(rows[-1][0]), top1=f"{100 * top1:.2f}%", refresh=False)
            if interrupt.asked and probe.step < probe.steps:
                checkpoint.save(probe)
                raise KeyboardInterrupt
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                checkpoint.save(probe)
                saved_at = time.monotonic()
    return rows


def batches(images: int, batch: int, seed: int, steps: range) -> Iterator[list[tuple[int, int]]]:
    """(epoch, image) pairs of each step: a permutation per epoch; its last batch may be short."""
    per_epoch = math.ceil(images / batch)
    order = np.empty(0, np.int64)
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == steps.start:
            order = np.random.default_rng((seed, epoch)).permutation(images)
        yield [(epoch, i) for i in order[place * batch : (place + 1) * batch].tolist()]


def cached(train: Encoded, order: Iterable[list[tuple[int, int]]]) -> Batches:
    """Features (n, f) and labels (n,) that were computed once."""
    features, labels = (torch.from_numpy(x) for x in train)
    for keys in order:
        chosen = torch.tensor([image for _, image in keys])
        yield features[chosen], labels[chosen]


def augmented(
    subject: Frozen, order: Iterable[list[tuple[int, int]]], seed: int, broken: set[str]
) -> Batches:
    """Features (n, f) of random crops, and labels (n,); files not readable are named in ``broken``.

    Another image takes the place of such a file, as in the pretraining.
    """
    loader = DataLoader(
        TwoViews(subject.data.train, CropAndFlip(subject), seed),
        batch_sampler=order,
        collate_fn=as_is,
        num_workers=subject.config.workers,
        pin_memory=subject.device.type == "cuda",
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    for batch in loader:
        broken.update(batch.broken)
        yield subject.encode_batch(batch.first), batch.labels


class CropAndFlip:
    """A random resized crop, flipped at random: ImageNet's usual training view.

    Takes the place of the pretraining's two views: the second is empty.
    """

    def __init__(self, subject: Frozen) -> None:
        data, size = subject.data, subject.config.image_size
        self.view = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(size, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean, data.std),
            ]
        )

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        view = torch.stack([self.view(image) for image in images])
        return view, view[:0]


class Checkpoint:
    """A linear evaluation that has not ended: the probe, and what it was begun with."""

    def __init__(self, path: Path, protocol: LinearProtocol, subject: Frozen) -> None:
        self.path = path
        self.begun_with = dataclasses.asdict(protocol) | {
            "data": subject.config.data,
            "encoder": f"{subject.state}, sha256 {_digest(subject.encoder)}",
        }

    def save(self, probe: Probe) -> None:
        content = {
            "begun_with": self.begun_with,
            "step": probe.step,
            "broken": sorted(probe.broken),
            "probe": probe.state_dict(),
            "optimizer": probe.optimizer.state_dict(),
            "schedule": probe.schedule.state_dict(),
        }
        with atomic_write(self.path) as temporary:
            torch.save(content, temporary)

    def restore(self, probe: Probe) -> None:
        """Put ``probe`` where the interrupted evaluation was, if there is one."""
        if not self.path.exists():
            return
        wanted = f"a folder whose {self.path.name} can be used (delete it to start over)"
        try:
            content = read_tensors(self.path)
            begun_with, step, broken = (content[x] for x in ("begun_with", "step", "broken"))
            if not (type(step) is int and 0 <= step <= probe.steps):
                raise ValueError(f"step {step} of {probe.steps}")
            begun = {name: begun_with[name] for name in self.begun_with}
        except Exception as error:  # whatever wrong content leads to
            raise OptionError("run", wanted, first_sentence(error)) from error
        for name, value in self.begun_with.items():
            if value != begun[name]:
                as_begun = (
                    f"{begun[name]!r}, as the unfinished evaluation in {self.path} was begun "
                    "(delete that file to start over)"
                )
                raise OptionError(name, as_begun, value)
        try:
            parts = {
                "probe": form(probe.state_dict()),
                "optimizer": form_of(probe.optimizer),
                "schedule": form(probe.schedule.state_dict()),
            }
            for name, ours in parts.items():
                if found := difference(ours, form(content[name]), name):
                    raise ValueError(found)
            probe.load_state_dict(content["probe"])
            probe.optimizer.load_state_dict(content["optimizer"])
            probe.schedule.load_state_dict(content["schedule"])
            probe.step, probe.broken = step, {str(name) for name in broken}
        except Exception as error:
            raise OptionError("run", wanted, first_sentence(error)) from error


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class FirstInterrupt:
    """Within it, the first Ctrl-C only asks to stop after the step in hand; the second stops."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> FirstInterrupt:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)
        # Not print: the progress bar may be inside the same stream's lock.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
