"""The command line of ``vne-pretrain``.

Exit codes: 0 done, 1 a part of the program is not installed, 2 a bad option, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.config import (
    AUGMENTATIONS,
    BACKBONES,
    CHECKPOINT,
    DIGITS,
    FREE_ON_RESUME,
    METHODS,
    PAPER,
    PRECISIONS,
    STEMS,
    Config,
    OptionError,
    Options,
)

DESCRIPTION = """\
Pretrain a ResNet without labels by maximising the von Neumann mutual information of two views:
loss = -S(U1) - beta * cos(U1, U2), beta rising linearly. With no options: ResNet-50 on
scikit-learn's handwritten digits (1797 real images, a fifth of them kept for testing), on two CPU
cores in less than six minutes.
"""

EPILOG = """\
augmentation:
  simclr   random crop, flip, colour jitter, grey; blur for images above 64 pixels
  affine   small rotation, shift, scale, aspect and shear, each image its own. For digits: a
           flipped or cropped digit may be another digit, and grey images have no colour to change.

written to the output folder:
  results.json         accuracies of the trained and the untrained encoder (and of raw pixels,
                       for small images), configuration, environment
  encoder.pt           the encoder's state dict in torchvision's names, without the classifier:
                       load it with torch.load(path, weights_only=True)
  last.ckpt            Lightning's checkpoint, for --resume
  metrics.csv          a row per step; entropies are in nats
  epochs.csv           a row per epoch; spectrum.csv: eigenvalues on a fixed batch
  loss.png, entropy.png, cosine.png, spectrum.png, and tensorboard/

Ctrl-C saves last.ckpt after the step in hand; --resume goes on from there with nothing lost.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vne-pretrain",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Options not given stay away, so that --resume can tell them from the defaults.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="WHAT",
        help="digits (default), cifar10, cifar100, an .npz (MedMNIST's keys: train_images, "
        "train_labels, test_images, test_labels), or an image folder (train/ and test/ or val/ of "
        "class folders, or class folders alone, a fifth of which is kept for testing)",
    )
    add("--out", metavar="DIR", help="output folder (default: runs/NAME-OF-THE-DATA)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--epochs", type=int, metavar="N", help=_default("epochs"))
    add("--batch-size", type=int, metavar="N", help="of all devices together (default: 128)")
    add("--lr", type=float, help=f"peak, for 256 images: scaled by batch size; {_default('lr')}")
    add("--weight-decay", type=float, help=f"not of biases and norms; {_default('weight_decay')}")
    add("--warmup-epochs", type=int, metavar="N", help=f"linear; {_default('warmup_epochs')}")
    add("--beta-start", type=float, help="weight of the cosine at the first step (default: 1)")
    add("--beta-end", type=float, help="and at the last, linear between (default: 10)")
    add("--method", choices=METHODS, help="of the entropy (default: auto)")
    add("--backbone", choices=BACKBONES, help="default: resnet50")
    add(
        "--stem",
        choices=STEMS,
        help="3x3: stride 1, no pooling, for small images; 7x7: ImageNet's; "
        "auto (default): 3x3 up to 64 pixels",
    )
    add("--projector-dim", type=int, metavar="D", help="of the embeddings (default: 256)")
    add("--image-size", type=int, metavar="PIXELS", help="default: the data's own; files: 224")
    add("--augment", choices=AUGMENTATIONS, help="auto (default): affine for digits, else simclr")
    add("--seed", type=int, help="of weights, order and views; the split is fixed (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: by data)")
    add("--accelerator", metavar="NAME", help="Lightning's: auto (default), cpu, gpu, mps, ...")
    add("--devices", metavar="N", help="how many (default: auto)")
    add(
        "--precision",
        choices=PRECISIONS,
        help="auto (default): bf16 autocast where it is faster, on a CPU by a short measurement",
    )
    add("--download-dir", metavar="DIR", help="for cifar10 and cifar100 (default: data)")
    return parser


def _default(name: str) -> str:
    return f"default: {DIGITS[name]:g} for digits, else {PAPER[name]:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    resume = given.pop("resume", False)
    try:
        options = Options(**given)
        _check_output(options.out_dir, resume)
        return _start(options, given, resume)
    except OptionError as error:
        print(f"vne-pretrain: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).split(".")[0]
        print(
            f"vne-pretrain: error: {module} is not installed; "
            "this program needs: pip install 'vne_kernels[pretrain]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nvne-pretrain: interrupted", file=sys.stderr)
        if (options.out_dir / CHECKPOINT).exists():
            _say_how_to_resume(str(options.out_dir))
        return 130


def _say_how_to_resume(out: str) -> None:
    print(
        f"go on from {CHECKPOINT} with:\n  vne-pretrain --resume --out {shlex.quote(out)}",
        file=sys.stderr,
    )


def _check_output(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OptionError("out", "a folder", str(out))
    exists = (out / CHECKPOINT).exists()
    if exists and not resume:
        wanted = "a folder without a run (or add --resume to go on with it)"
        raise OptionError("out", wanted, str(out))
    if resume and not exists:
        raise OptionError("resume", f"used with an --out that holds {CHECKPOINT}", str(out))


def _start(options: Options, given: dict[str, Any], resume: bool) -> int:
    # Here, not above: help and the checks of the options come at once, without the extra.
    from vne_kernels.pretrain.data import load
    from vne_kernels.pretrain.run import Interrupted, run

    if resume:
        config = resumed_config(options.out_dir, given)
        data = load(config.data, config.download_dir)
    else:
        data = load(options.data, options.download_dir)
        config = options.resolved(data.native_size)
    try:
        run(config, data, resume=resume)
    except Interrupted:
        print("stopped and saved; nothing is lost", file=sys.stderr)
        _say_how_to_resume(config.out)
        return 130
    return 0


def resumed_config(out: Path, given: dict[str, Any]) -> Config:
    """The run's own options; those ``given`` must agree, or be free to change."""
    path = out / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = Config(**saved | {"out": str(out)})
    except (OSError, ValueError, TypeError) as error:
        raise OptionError("resume", f"used with a readable {path}", str(error)) from error
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != getattr(config, name):
            wanted = f"left out or {getattr(config, name)!r}, as the run began, with --resume"
            raise OptionError(name, wanted, value)
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return dataclasses.replace(config, **free)
