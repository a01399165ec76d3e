"""``vne-pretrain linear-eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.commands import _frozen
from vne_kernels.pretrain.protocol import LinearProtocol, Setting

DESCRIPTION = """\
The paper's linear evaluation (Appendix C): a linear classifier is trained by SGD on the features of
a run's frozen encoder, for 100 epochs of a cosine schedule. Its accuracy on the test images after
the last epoch is the result, whatever the epochs before it reached.
"""

EPILOG = """\
Features are computed once, of each image as it is: fast, and the same every time. They stay in
memory, 8 KB an image of a ResNet-50. With --augment they are computed again in every epoch, of
random crops; for large sets use a GPU and --workers.

A momentum of 0.995 averages over hundreds of steps: it is made for sets such as CIFAR-10, with tens
of thousands. On a set with a few hundred (digits: 600), --momentum 0.9 came out better in a trial.

written to RUN:
  linear_eval.json     accuracy (0 to 1; top-5 too where there are more than five classes),
                       hyper-parameters, data, versions
  linear_eval.csv      a row per epoch
  linear_eval.ckpt     left by Ctrl-C (and every minute) until the end: the same command goes on
"""


def configure(parser: argparse.ArgumentParser) -> None:
    _frozen.configure(parser)
    add = parser.add_argument
    add("--epochs", type=int, metavar="N", help=_default("epochs"))
    add("--batch-size", type=int, metavar="N", help=_default("batch_size"))
    add("--lr", type=float, help=f"at the start, not scaled by batch size; {_default('lr')}")
    add("--momentum", type=float, help=_default("momentum"))
    add("--weight-decay", type=float, help=_default("weight_decay"))
    add(
        "--augment",
        action="store_true",
        help="random resized crop and flip of the training images, new in every epoch",
    )
    add("--seed", type=int, help=f"of the classifier, the order and the crops; {_default('seed')}")


def _default(name: str) -> str:
    return f"default: {getattr(LinearProtocol, name):g}"


def start(given: dict[str, Any]) -> int:
    run = Path(given["run"])
    protocol, setting = _frozen.pick(LinearProtocol, given), _frozen.pick(Setting, given)

    from vne_kernels.pretrain import linear_eval

    stem = setting.file_stem("linear_eval")
    try:
        result = linear_eval.evaluate(run, protocol, setting)
    except KeyboardInterrupt:
        if not (run / f"{stem}.ckpt").exists():
            raise
        print(f"\nstopped; the same command goes on from {run / stem}.ckpt", file=sys.stderr)
        return 130
    names = {"accuracy": "top-1", "top5_accuracy": "top-5"}
    scores = ", ".join(f"{names[x]} {100 * result[x]:.2f} %" for x in names if x in result)
    print(f"linear evaluation of the {setting.encoder} encoder, {result['features']}: {scores}")
    print(f"wrote {stem}.json and {stem}.csv in {run}")
    return 0
