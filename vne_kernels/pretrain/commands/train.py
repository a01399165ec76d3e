"""``vne-pretrain train``, and bare ``vne-pretrain``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vne_kernels.common.files import spare
from vne_kernels.common.reading import FileError, printable
from vne_kernels.common.stopping import REQUEUE, Stopped, StopSignals
from vne_kernels.pretrain import checkpoints
from vne_kernels.pretrain.config import (
    AUGMENTATIONS,
    BACKBONES,
    BATCH_NORMS,
    BETA_SCHEDULES,
    DIGITS,
    LOSSES,
    METHODS,
    PAPER,
    PRECISIONS,
    STEMS,
    OptionError,
    Options,
    load_config,
    resumed_config,
)
from vne_kernels.pretrain.disk import held
from vne_kernels.pretrain.faults import Fault

#: What a run ends with.
LAST_FILES = ("results.json", "report.html")
#: All that it writes, but for the folders checkpoints/ and tensorboard/.
FILES = (
    *("config.json", "environment.json", "encoder.pt", "nonfinite.json", *LAST_FILES),
    *("metrics.csv", "epochs.csv", "spectrum.csv", "events.csv", "loss.png", "entropy.png"),
    *("information.png", "cosine.png", "effective_rank.png", "accuracy.png", "spectrum.png"),
)

DESCRIPTION = """\
Pretrain a ResNet without labels by maximising the von Neumann mutual information of two views:
loss = -S(U1) - beta * cos(U1, U2), beta rising linearly; or by another loss. With no options:
ResNet-50 on scikit-learn's handwritten digits (1797 real images, a fifth of them held out for
testing), on two CPU cores in six to eight minutes.
"""

EPILOG = """\
recipes: --recipe NAME takes a protocol of the paper (vne-pretrain recipes lists them), or a file of
your own; every other option given overrides it.

augmentation:
  simclr   random crop, flip, colour jitter, grey; blur for images above 64 pixels
  simsiam, byol   as these were published (the paper's Table 5)
  affine   small rotation, shift, scale, aspect and shear, each image its own. For digits: a
           flipped or cropped digit may be another digit, and grey images have no colour to change.

written to the output folder:
  report.html          what came of the run, in one file that can be mailed
  results.json         accuracies of the trained and the untrained encoder (and of raw pixels,
                       for small images), configuration, environment
  encoder.pt           the encoder's state dict in torchvision's names, without the classifier:
                       load it with torch.load(path, weights_only=True), or vne-pretrain export
  checkpoints/         Lightning's checkpoints, for --resume: the newest is the one to go on from
  metrics.csv          a row per step; entropies are in nats
  epochs.csv           a row per epoch; spectrum.csv: eigenvalues on a fixed batch
  events.csv           collapses, images that could not be read
  *.png                loss, entropy, cosine, spectrum, accuracies; and tensorboard/

Ctrl-C saves a checkpoint after the step in hand; --resume goes on from there with nothing lost, and
after a crash or a power cut from the last checkpoint. SIGTERM and SIGUSR1, by which a cluster takes
its machine back, save one too; then the exit code is 75, on which a scheduler can requeue the same
command with --resume auto.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="a protocol by its name or its .toml file")
    add(
        "--data",
        metavar="WHAT",
        help="digits (default), cifar10, cifar100, an .npz (MedMNIST's keys: train_images, "
        "train_labels, test_images, test_labels), or an image folder (train/ and test/ or val/ of "
        "class folders, or class folders alone, a fifth of which is held out for testing)",
    )
    add(
        "--classes",
        metavar="LIST",
        help="of an image folder: imagenet10 or imagenet100 (the paper's Table 6), or a file with "
        "a folder's name in each line (default: all)",
    )
    add(
        "--train-images",
        type=int,
        metavar="N",
        help="so many of the training images, of every class in proportion (default: all)",
    )
    add("--out", metavar="DIR", help="output folder (default: runs/NAME of the recipe or the data)")
    add(
        "--resume",
        nargs="?",
        const=True,
        choices=("auto",),
        help="go on with the run in the output folder; auto: or begin it, if there is none",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace files in the output folder that are not those of a run",
    )
    add(
        "--checkpoint-every",
        type=float,
        metavar="SECONDS",
        help="0: after every step (default: 60)",
    )
    add("--keep-checkpoints", type=int, metavar="N", help="the newest ones (default: 3)")
    add("--loss", choices=LOSSES, help="default: vn-doe, the paper's Algorithm 1")
    add("--epochs", type=int, metavar="N", help=_default("epochs"))
    add("--batch-size", type=int, metavar="N", help="of all devices together (default: 128)")
    add(
        "--accumulate",
        type=int,
        metavar="N",
        help="batches whose gradients make one optimiser step (default: 1); the loss stays that of "
        "a batch, the learning rate scales with the images of a step",
    )
    add("--lr", type=float, help=f"peak, for 256 images: scaled by batch size; {_default('lr')}")
    add("--weight-decay", type=float, help=f"not of biases and norms; {_default('weight_decay')}")
    add("--warmup-epochs", type=int, metavar="N", help=f"linear; {_default('warmup_epochs')}")
    add(
        "--beta-schedule",
        choices=BETA_SCHEDULES,
        help="of the weight of the cosine in the differences of entropies: linear (default) from "
        "--beta-start to --beta-end, or constant at --beta-start",
    )
    add("--beta-start", type=float, help="at the first step (default: 1)")
    add("--beta-end", type=float, help="and at the last (default: 10)")
    add(
        "--temperature",
        type=float,
        help="of simclr (default: 0.5 for small images, else 0.1) and shannon-doe (0.1)",
    )
    add("--method", choices=METHODS, help="of the entropy (default: auto)")
    add("--backbone", choices=BACKBONES, help="default: resnet50")
    add(
        "--stem",
        choices=STEMS,
        help="3x3: stride 1, no pooling, for small images; 7x7: ImageNet's; "
        "auto (default): 3x3 up to 64 pixels",
    )
    add(
        "--projector-dim",
        type=int,
        metavar="D",
        help="of the embeddings (default: by the loss; vn-doe: 256 for small images, else 512)",
    )
    add("--projector-hidden", type=int, metavar="D", help="width of its hidden layers (2048)")
    add("--projector-layers", type=int, metavar="N", help="how many (1 for small images, else 2)")
    add(
        "--batch-norm",
        choices=BATCH_NORMS,
        help="statistics over both views together (joint, default), or one pass and statistics for "
        "each view (per-view, as in Algorithm 1)",
    )
    add("--image-size", type=int, metavar="PIXELS", help="default: the data's own; files: 224")
    add(
        "--augment",
        choices=AUGMENTATIONS,
        help="auto (default): affine for digits, else the one the loss was published with",
    )
    add(
        "--knn-every",
        type=int,
        metavar="N",
        help="epochs between two looks at the test accuracy of the online linear probe and nearest "
        f"neighbours, 0: never; {_default('knn_every')}",
    )
    add(
        "--no-evaluation",
        dest="evaluation",
        action="store_false",
        help="end without the probes on frozen features (linear-eval and knn can be run later)",
    )
    add("--seed", type=int, help="of weights, order and views; the split is fixed (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: by data)")
    add("--accelerator", metavar="NAME", help="Lightning's: auto (default), cpu, gpu, mps, ...")
    add(
        "--devices",
        metavar="N",
        help="how many, a process each (default: auto; under torchrun: as it says)",
    )
    add(
        "--collective-timeout",
        type=int,
        metavar="SECONDS",
        help="with several processes: after which one that hangs ends them all (default: 600)",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="auto (default): bf16 autocast where it is faster, on a CPU by a short measurement; "
        "16-mixed: fp16 autocast with a gradient scaler",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile encoder and heads (channels_last they are in any case)",
    )
    add("--download-dir", metavar="DIR", help="for cifar10 and cifar100 (default: data)")


def _default(name: str) -> str:
    return f"default: {DIGITS[name]:g} for digits, else {PAPER[name]:g}"


def start(given: dict[str, Any]) -> int:
    from vne_kernels.pretrain import recipes

    asked, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    if given.get("out") == "":
        raise OptionError("out", "the name of a folder", "")
    out = Path(given["out"]) if "out" in given else Options(**given).out_dir
    resume = asked is True or (asked == "auto" and _holds_a_run(out))
    _check_output(out, resume)
    if asked == "auto" and all((out / name).exists() for name in LAST_FILES):
        resumed_config(out, given)  # the options agree
        print(f"the run in {out} is finished")
        return 0
    options = None if resume else recipes.options(given)
    try:
        with StopSignals() as signals, _alone_in(out, overwrite):
            _run(options, out, given, signals)
    except Stopped as stopped:
        return _report_stop(stopped, out)
    except Fault as fault:
        return _report_fault(fault, out)
    except KeyboardInterrupt:
        if checkpoints.files(out):
            _say_how_to_resume(out)
        raise
    return 0


def _run(options: Options | None, out: Path, given: dict[str, Any], signals: StopSignals) -> None:
    # Here, not above: help and the checks of the options come at once, without the extra.
    from vne_kernels.pretrain.data import load, load_for
    from vne_kernels.pretrain.run import run

    if options is None:
        config = resumed_config(out, given)
        data = load_for(config)
    else:
        data = load(
            options.data,
            options.download_dir,
            classes=options.classes,
            train_images=options.train_images,
        )
        config = options.resolved(data.native_size)
    run(config, data, resume=options is None, signals=signals)


def _report_fault(fault: Fault, out: Path) -> int:
    """Prints the fault; returns the exit code."""
    from vne_kernels.pretrain.ranks import global_rank

    if global_rank() == 0 or not fault.agreed:
        # The message starts a new line, since a progress bar may be on the current one.
        print(f"\nvne-pretrain: error: {printable(fault, 4000)}", file=sys.stderr)
        if checkpoints.files(out):
            _say_how_to_resume(out)
    return fault.exit_code


def _report_stop(stopped: Stopped, out: Path) -> int:
    """Prints that the run has stopped, and how it continues; returns the exit code."""
    if stopped.signum == signal.SIGINT:
        print("stopped and saved; nothing is lost", file=sys.stderr)
        _say_how_to_resume(out)
        return 130
    print(
        f"{stopped}: stopped and saved; run the same command with --resume auto to go on",
        file=sys.stderr,
    )
    return REQUEUE


def _say_how_to_resume(out: Path) -> None:
    print(
        f"go on from the last checkpoint with:\n"
        f"  vne-pretrain --resume --out {shlex.quote(str(out))}",
        file=sys.stderr,
    )


def _holds_a_run(out: Path) -> bool:
    """One that has begun, whether or not it has come to its first checkpoint."""
    return (out / "config.json").exists()


@contextmanager
def _alone_in(out: Path, overwrite: bool) -> Iterator[None]:
    """Holds the output folder for this run; what lies there must be a run's, or be replaced.

    Of several processes the first does so for all.
    """
    from vne_kernels.pretrain.ranks import global_rank

    if global_rank() != 0:
        yield
        return
    with held("out", out, "train"):
        if not (overwrite or _is_ours(out)):
            try:
                spare(out, FILES, "--overwrite replaces them")
            except FileError as error:
                raise OptionError("out", "a folder without foreign files", str(error)) from error
        yield


def _is_ours(out: Path) -> bool:
    try:
        load_config(out)
    except OptionError:
        return False
    return True


def _check_output(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OptionError("out", "a folder", str(out))
    if checkpoints.files(out) and not resume:
        wanted = "a folder without a run (or add --resume to go on with it)"
        raise OptionError("out", wanted, str(out))
    if resume and not _holds_a_run(out):
        raise OptionError("resume", "used with an --out that holds a run", str(out))
