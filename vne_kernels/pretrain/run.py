"""One run, from the images to ``results.json``."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vne_kernels.common.files import atomic_write, remove_temporaries, write_json
from vne_kernels.common.reading import printable
from vne_kernels.common.stopping import Stopped, StopSignals
from vne_kernels.pretrain import checkpoints, environment, evaluate, precision, ranks, report
from vne_kernels.pretrain.augment import make_views, plain_view
from vne_kernels.pretrain.callbacks import (
    BrokenImages,
    MetricsTables,
    OnlineEvaluation,
)
from vne_kernels.pretrain.checkpoints import Resumed
from vne_kernels.pretrain.config import (
    DIFFERENCES_OF_ENTROPIES,
    SMALL,
    Config,
    OptionError,
)
from vne_kernels.pretrain.data import EpochSampler, ImageData, ViewBatch, view_loader
from vne_kernels.pretrain.disk import Disk, has_to_be_written
from vne_kernels.pretrain.environment import device_name
from vne_kernels.pretrain.events import BROKEN_IMAGE, DISK, Events, read_events
from vne_kernels.pretrain.faults import Fault, compilation, loading_processes
from vne_kernels.pretrain.finite import FiniteLoss
from vne_kernels.pretrain.model import Pretraining, make_encoder
from vne_kernels.pretrain.saving import CheckpointFolder, Checkpoints
from vne_kernels.pretrain.tables import read_table
from vne_kernels.pretrain.tensorboard import PatientTensorBoard

EVENTS, ENVIRONMENT = "events.csv", "environment.json"
LOG_STEPS = 10  # between two points in TensorBoard; metrics.csv has every step


def run(config: Config, data: ImageData, *, resume: bool, signals: StopSignals) -> None:
    """Train (or go on training), evaluate, draw, write ``results.json``.

    Raises:
        OptionError: the options do not fit the data or the machine.
        Stopped: a signal ended it; what was trained is saved.
    """
    start = time.monotonic()
    _quiet()
    config = _with_precision(config)
    out = Path(config.out).absolute()
    trainer: pl.Trainer  # the disk reports only while it trains
    events: Events
    disk = Disk(lambda message: events.add(trainer.global_step, DISK, message))
    events = Events(out / EVENTS, disk)
    online = OnlineEvaluation(
        data.train,
        data.test,
        plain_view(data, config.image_size),
        every=config.knn_every,
        workers=config.workers,
    )
    fixed = _fixed_batch(config, data)
    tables = MetricsTables(out, fixed, config.projector_dim, online, events)
    processes = ranks.Ranks()
    finite = FiniteLoss(out, data.train, events)
    broken = BrokenImages(events)
    resumed = checkpoints.newest(config) if resume else Resumed()
    before_saving = (broken.before_saving, tables.before_saving)
    saving = Checkpoints(config, out, signals, resumed, events, before_saving)
    callbacks = [TQDMProgressBar(), processes, finite, broken, tables, saving]
    checkpoint_io = CheckpointFolder(disk, tables.all_on_disk)
    logger = PatientTensorBoard(str(out), disk)
    trainer = _trainer(config, callbacks, checkpoint_io, logger)
    device = trainer.strategy.root_device
    steps = config.epochs * _steps_per_epoch(config, len(data.train))
    if resumed.step > steps:
        wanted = f"used with a checkpoint of at most {steps} steps"
        raise OptionError("resume", wanted, resumed.step)
    loader = _loader(config, data, trainer, resumed.step)
    described = environment.describe(device)
    if resume:
        described = environment.resumed(out / ENVIRONMENT, described)
    if trainer.is_global_zero:
        _begin_output(out, config, described)
        _announce(config, data, steps, device)
        if resume:
            print(f"resumed   {resumed}", flush=True)

    module = _seeded_module(config, steps, data.classes)
    steps_by = module.configure_optimizers()
    schedule = steps_by["lr_scheduler"]["scheduler"]
    resumed.check_fits(module, steps_by["optimizer"], schedule, trainer.fit_loop.state_dict())
    fit_start = time.monotonic()
    with (
        processes.reported(trainer),
        saving.restoring(),  # outside of those below, which know a fault of a disk or a loader
        has_to_be_written(out),
        loading_processes(),
        compilation(config),
    ):
        trainer.fit(module, loader, ckpt_path=resumed.path, weights_only=True)
    fit_seconds = time.monotonic() - fit_start
    if not trainer.is_global_zero and _started_by_another(trainer):
        return
    if signals.received:
        if out / checkpoints.FOLDER in disk.failing:
            raise Fault(f"stopped, and not saved: {out / checkpoints.FOLDER} cannot be written")
        raise Stopped(signals.received)
    if not trainer.is_global_zero:
        return

    with has_to_be_written(out):
        if not tables.all_on_disk():
            raise Fault("the disk has no room for the tables; make room, then go on")
        _save_encoder(module.encoder, out / "encoder.pt")
        results: dict[str, Any] = {}
        if config.evaluation:
            print("evaluating: untrained and trained encoder, linear probe and nearest neighbours")
            results["evaluation"] = _evaluate(config, data, module.encoder, device)
            _print_scores(results["evaluation"])
        results["training"] = {
            "steps": steps,
            "last_epoch": _last_epoch(out),
            "steps_of_this_process": steps - resumed.step,
            "seconds_of_this_process": round(fit_seconds, 2),
        }
        results["data"] = _describe_data(config, data, out)
        results |= {"config": dataclasses.asdict(config), "environment": described}
        results["seconds"] = round(time.monotonic() - start, 2)
        write_json(out / "results.json", results)
        report.write(out)
    print(
        "wrote report.html, results.json, encoder.pt, checkpoints, tables (*.csv) and pictures "
        f"(*.png) in {out}"
    )


def _describe_data(config: Config, data: ImageData, out: Path) -> dict[str, Any]:
    return {
        "name": config.data,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
        "probe_training_images": min(len(data.train), evaluate.PROBE_IMAGES),
        "broken_images": sum(kind == BROKEN_IMAGE for _, kind, _ in read_events(out / EVENTS)),
    }


def _begin_output(out: Path, config: Config, described: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_temporaries(out / checkpoints.FOLDER)
        write_json(out / "config.json", dataclasses.asdict(config))
        write_json(out / ENVIRONMENT, described)
    except OSError as error:
        raise OptionError("out", "a folder that can be written", f"{out} ({error})") from error


def _quiet() -> None:
    """Keep Lightning's hints to itself, where they do not concern the user of this program."""
    # lightly imports the same library under its older names, and the last imported one speaks
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        # ours resumes anywhere by its seeds
        ".*your dataloader is not resumable.*",
        ".*checkpoint that ended before the epoch ended.*",
        ".*is deprecated.*LeafSpec.*",
        ".*LeafSpec.*is deprecated.*",
        ".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",
    ):
        warnings.filterwarnings("ignore", message)


def _with_precision(config: Config) -> Config:
    if config.precision != "auto":
        return config
    device = _device_type(config.accelerator)
    if device == "cpu" and math.prod(ranks.number(config, device)) > 1:
        # each would measure for itself, and one might choose otherwise
        return dataclasses.replace(config, precision="32-true")
    encoder = make_encoder(config.backbone, config.stem)
    return dataclasses.replace(
        config, precision=precision.choose(encoder, config.image_size, device)
    )


def _device_type(accelerator: str) -> str:
    """What Lightning will take, before there is a trainer to ask."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _trainer(
    config: Config,
    callbacks: list[pl.Callback],
    checkpoint_io: CheckpointFolder,
    logger: PatientTensorBoard,
) -> pl.Trainer:
    device_type = _device_type(config.accelerator)
    devices, nodes = ranks.number(config, device_type)
    # Lightning itself would take bf16 instead; torch has fp16 and its scaler on the CPU too.
    fp16_on_cpu = (config.precision, device_type) == ("16-mixed", "cpu")
    own_precision = [MixedPrecision("16-mixed", "cpu")] if fp16_on_cpu else []
    try:
        return pl.Trainer(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=ranks.strategy(devices * nodes, config.collective_timeout),
            # read from the options alone; mypy cannot know that they are checked
            precision=None if own_precision else config.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=config.accumulate,
            max_epochs=config.epochs,
            logger=logger,
            callbacks=callbacks,
            log_every_n_steps=LOG_STEPS,
            enable_checkpointing=False,
            plugins=[checkpoint_io, *own_precision],
            enable_model_summary=False,
            # torch has none on a CPU: there each process takes its own part's statistics
            sync_batchnorm=device_type == "cuda",
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        got = f"{config.accelerator} with --devices {config.devices}: {reason}"
        raise OptionError("accelerator", "one that this machine has", got) from error


def _loader(
    config: Config, data: ImageData, trainer: pl.Trainer, steps_done: int
) -> DataLoader[ViewBatch]:
    """The batches of this process from the step after ``steps_done`` on."""
    world = trainer.world_size
    if config.batch_size % world:
        wanted = f"a multiple of the {world} processes"
        raise OptionError("batch_size", wanted, config.batch_size)
    sampler = EpochSampler(
        len(data.train),
        config.batch_size // world,
        config.seed,
        accumulate=config.accumulate,
        steps_done=steps_done,
        rank=trainer.global_rank,
        world=world,
    )
    return view_loader(
        data.train,
        make_views(config.augment, data, config.image_size),
        sampler,
        workers=config.workers,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )


def _steps_per_epoch(config: Config, images: int) -> int:
    if config.batch_size > images:
        wanted = f"at most the {images} training images"
        raise OptionError("batch_size", wanted, config.batch_size)
    if config.step_images > images:
        wanted = f"at most {images // config.batch_size}, the batches of an epoch"
        raise OptionError("accumulate", wanted, config.accumulate)
    return images // config.step_images


def _announce(config: Config, data: ImageData, steps: int, device: torch.device) -> None:
    size = config.image_size
    print(
        f"data      {printable(config.data)}: {len(data.train)} training and {len(data.test)} test "
        f"images, {data.classes} classes, {size} x {size} pixels, augmentation {config.augment}\n"
        f"model     {config.backbone}, stem {config.stem}, projection to {config.projector_dim}\n"
        f"loss      {_format_loss(config)}\n"
        f"training  {config.epochs} epochs, {steps} steps of {_format_step(config)} images, "
        f"learning rate {config.lr * config.step_images / 256:g}, {config.precision} on "
        f"{device_name(device)}{', compiled' if config.compile else ''}\n"
        f"output    {config.out}",
        flush=True,
    )


def _format_step(config: Config) -> str:
    accumulated = config.accumulate > 1
    return f"{config.accumulate} x {config.batch_size}" if accumulated else str(config.batch_size)


def _format_loss(config: Config) -> str:
    if config.loss not in DIFFERENCES_OF_ENTROPIES:
        return config.loss
    if config.beta_schedule == "constant":
        return f"{config.loss}, beta {config.beta_start:g}"
    return f"{config.loss}, beta {config.beta_start:g} to {config.beta_end:g}"


def _seeded_module(config: Config, steps: int, classes: int) -> Pretraining:
    """The untrained network: a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Pretraining(config, steps, classes)


def _started_by_another(trainer: pl.Trainer) -> bool:
    """Lightning's own launcher takes any exit code but 0 of such a process for a failure."""
    return isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)


def _fixed_batch(config: Config, data: ImageData) -> Tensor:
    """A fixed batch of training images, whatever their order on disk."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    view = plain_view(data, config.image_size)
    return torch.stack([view(data.train.readable(int(i))[1]) for i in order[: config.batch_size]])


def _save_encoder(encoder: nn.Module, path: Path) -> None:
    state = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _evaluate(
    config: Config, data: ImageData, trained: nn.Module, device: torch.device
) -> dict[str, dict[str, float]]:
    """Scores of the pixels themselves (of small images), the untrained and the trained encoder."""
    encoders = {"untrained": evaluate.untrained_encoder(config), "trained": trained}
    if config.image_size <= SMALL:
        encoders = {"pixels": nn.Flatten(), **encoders}
    view = plain_view(data, config.image_size)
    evaluation = {}
    for name, encoder in encoders.items():
        train, test = (
            evaluate.encode(
                encoder,
                images,
                view,
                device,
                bf16=config.precision == "bf16-mixed" and name != "pixels",
                workers=config.workers,
                progress=f"{name}: features",
            )
            for images in (evaluate.probe_subset(data.train), data.test)
        )
        evaluation[name] = evaluate.scores(*train, *test)
    return evaluation


def _print_scores(evaluation: dict[str, dict[str, float]]) -> None:
    names = list(evaluation["trained"])
    print(f"\n{'test accuracy, %':<40}" + "".join(f"{name:>12}" for name in evaluation))
    for name in names:
        title = name.replace("_", " ") + ("" if "labels" in name else ", all labels")
        title = title.replace("10 labels", "with 10 labels per class")
        row = "".join(f"{100 * scores[name]:12.2f}" for scores in evaluation.values())
        print(f"{title:<40}{row}")
    print(flush=True)


def _last_epoch(out: Path) -> dict[str, float]:
    """Without what was not measured: JSON has no NaN."""
    header, rows = read_table(out / "epochs.csv")
    named = zip(header, rows[-1], strict=True)
    return {name: value for name, value in named if not math.isnan(value)}
