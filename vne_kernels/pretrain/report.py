"""``report.html``: what came of a run, in one file that needs nothing else.

Everything is read from the run's folder, which works for an interrupted run too: what it has not
reached yet is left out. The pictures are drawn from the tables each time.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import shlex
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import jinja2
from typing_extensions import Required  # of typing from Python 3.11 on

import vne_kernels
from vne_kernels.common.files import atomic_write
from vne_kernels.common.reading import Kind, read_json
from vne_kernels.pretrain import plots, recipes
from vne_kernels.pretrain.config import (
    DIFFERENCES_OF_ENTROPIES,
    FREE_ON_RESUME,
    LOSSES,
    Config,
    OptionError,
    load_config,
)
from vne_kernels.pretrain.events import BROKEN_IMAGE, COLLAPSE, RECOVERED, read_events
from vne_kernels.pretrain.protocol import ENCODERS, LinearProtocol, Setting
from vne_kernels.pretrain.tables import read_table

FILE = "report.html"
SHOWN_IMAGES = 20  # broken ones that are named at once; the others unfold

#: Every option of a run, in the order in which a reader asks for them.
OPTIONS = {
    "Data": ("data", "classes", "train_images", "image_size", "augment", "download_dir"),
    "Network": (
        "backbone",
        "stem",
        "projector_layers",
        "projector_hidden",
        "projector_dim",
        "batch_norm",
    ),
    "Loss": ("loss", "method", "temperature", "beta_schedule", "beta_start", "beta_end"),
    "Optimisation": (
        "epochs",
        "warmup_epochs",
        "batch_size",
        "accumulate",
        "lr",
        "weight_decay",
        "seed",
    ),
    "Execution": (
        "accelerator",
        "devices",
        "collective_timeout",
        "precision",
        "compile",
        "workers",
        "knn_every",
        "evaluation",
        "checkpoint_every",
        "keep_checkpoints",
    ),
}

#: Options that mean nothing to the other losses.
OF_LOSSES = {
    "temperature": ("simclr", "shannon-doe"),
    "method": ("vn-doe", "vn-doe-symmetric"),
    **dict.fromkeys(("beta_schedule", "beta_start", "beta_end"), DIFFERENCES_OF_ENTROPIES),
}

SCORES = {
    "linear_probe": "Linear probe (logistic regression), all labels",
    "knn": "Nearest neighbours, all labels",
    "linear_probe_10_labels": "Linear probe, 10 labels per class",
    "knn_10_labels": "Nearest neighbours, 10 labels per class",
}

#: Name of a picture -> what its reader has to know.
CAPTIONS = {
    "accuracy": "While it trained, on the test images (of a large set, a fixed part): a linear "
    "probe trained in the same steps, whose gradient stays out of the encoder, and nearest "
    "neighbours.",
    "loss": "The loss of every step and its mean over each epoch.",
    "entropy": "Von Neumann entropy of the first view's embeddings. It is 0 when all point the "
    "same way (collapse).",
    "information": "The information that the loss itself estimates. InfoNCE cannot tell more than "
    "log n of a batch of n images.",
    "effective_rank": "How many directions a fixed batch of images uses: exp of its entropy.",
    "cosine": "How alike the embeddings of the two views of an image are.",
    "spectrum": "Eigenvalues of the density matrix of a fixed batch; epoch 0 is the untrained "
    "network.",
}


class Training(TypedDict):
    steps_of_this_process: int
    seconds_of_this_process: float


class Data(TypedDict):
    train_images: int
    test_images: int
    classes: int


class Resumption(TypedDict):
    started: str
    device: str
    torch: str
    commit: str | None


Environment = dict[str, str | int | float | bool | list[Resumption] | None]


class Results(TypedDict, total=False):
    """What is read of ``results.json``; the classes around it: of what it and others hold."""

    training: Training
    data: Data
    evaluation: dict[str, dict[str, float]]
    environment: Environment


class LinearEval(TypedDict, total=False):
    accuracy: Required[float]
    top5_accuracy: float
    measured: Required[str]
    features: Required[str]
    protocol: Required[LinearProtocol]
    broken_images: Required[dict[str, int]]


class KNN(TypedDict):
    accuracy: float
    neighbours: int
    temperature: float
    broken_images: dict[str, int]


class Figure(NamedTuple):
    """A number at the head of the report."""

    label: str
    value: str
    note: str


class Option(NamedTuple):
    name: str
    value: str
    usual: str | None  # of the recipe or by default, where the run departs from it


class Measured(NamedTuple):
    """A result of ``linear-eval`` or ``knn``."""

    what: str
    encoder: str
    top1: str
    top5: str
    how: str


def write(run: Path) -> Path:
    """Draw the pictures of the run in the folder ``run`` and write its ``report.html``.

    Returns:
        The report's path.

    Raises:
        OptionError: ``run`` holds no ``config.json``, or a file that cannot be read or written.
    """
    config = load_config(run)
    try:
        drawn = plots.draw_all(run, config.batch_size, config.projector_dim, config.loss)
        html = _template().render(_content(run, config, drawn))
        with atomic_write(run / FILE) as temporary:
            temporary.write_text(html, encoding="utf-8")
    except OptionError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError) as error:
        wanted = "a run's folder whose tables can be read, and that can be written to"
        raise OptionError("run", wanted, f"{run} ({error})") from error
    return run / FILE


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vne_kernels.pretrain"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _content(run: Path, config: Config, drawn: list[Path]) -> dict[str, Any]:
    results = _read(run / "results.json", Results)
    environment = _read(run / "environment.json", Environment) or results.get("environment", {})
    resumed = environment.get("resumed", [])
    last = _last_epoch(run / "epochs.csv")
    events = [(int(step), kind, message) for step, kind, message in read_events(run / "events.csv")]
    evaluation = results.get("evaluation", {})
    measured = list(_measured(run))
    groups, usual = _options(config)
    return {
        "name": run.resolve().name,
        "config": config,
        "loss": LOSSES[config.loss],
        "data": results.get("data"),
        "finished": bool(results),
        "epochs": int(last.get("epoch", 0)),
        "resume": shlex.join(["vne-pretrain", "--resume", "--out", str(run)]),
        "figures": list(_figures(config, evaluation, measured, last, results.get("training"))),
        "encoders": list(evaluation),
        "scores": [
            (title, [_percent(scores[name]) for scores in evaluation.values()])
            for name, title in SCORES.items()
            if evaluation
        ],
        "measured": measured,
        "pictures": _pictures(drawn),
        "changes": [event for event in events if event[1] != BROKEN_IMAGE],
        "broken": [event for event in events if event[1] == BROKEN_IMAGE],
        "watched": (run / "events.csv").exists(),
        "collapsed_since": _collapsed_since(events),
        "shown_images": SHOWN_IMAGES,
        "usual": usual,
        "option_groups": groups,
        "environment": {
            name: value
            for name, value in environment.items()
            if value is not None and name not in ("command", "resumed")
        },
        "resumed": resumed if isinstance(resumed, list) else [],
        "command": environment.get("command"),
        "version": vne_kernels.__version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _read(path: Path, kind: type[Kind]) -> Kind:
    """The content of a JSON file, empty where there is none."""
    try:
        return read_json(path, kind)
    except FileNotFoundError:
        return cast(Kind, {})


def _last_epoch(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    header, rows = read_table(path)
    return dict(zip(header, rows[-1], strict=True)) if rows else {}


def _figures(
    config: Config,
    evaluation: dict[str, dict[str, float]],
    measured: list[Measured],
    last: dict[str, float],
    training: Training | None,
) -> Iterator[Figure]:
    for what, name, title in (
        ("linear-eval", "linear_probe", "Linear probe"),
        ("knn", "knn", "Nearest neighbours"),
    ):
        own = [m for m in measured if (m.what, m.encoder) == (what, "trained")]
        if own:
            yield Figure(title, own[0].top1, f"test top-1, vne-pretrain {what}")
        elif evaluation:
            before = _percent(evaluation["untrained"][name])
            yield Figure(title, _percent(evaluation["trained"][name]), f"test; untrained {before}")
    if "probe_entropy" in last:
        entropy, most = last["probe_entropy"], min(config.batch_size, config.projector_dim)
        yield Figure("Effective rank", f"{math.exp(entropy):.1f}", f"of at most {most}")
        limit = math.log(most)
        yield Figure("Entropy", f"{entropy:.2f} nats", f"of at most {limit:.2f}, fixed batch")
    if "cosine" in last:
        yield Figure("Cosine of the views", f"{last['cosine']:.3f}", "mean of the last epoch")
    epochs = f"{int(last.get('epoch', 0))} of {config.epochs}"
    if training:
        took = _duration(training["seconds_of_this_process"])
        steps = training["steps_of_this_process"]
        yield Figure("Training", took, f"for {steps:,} steps; {epochs} epochs")
    else:
        yield Figure("Training", epochs, "epochs; not finished")


def _measured(run: Path) -> Iterator[Measured]:
    for encoder in ENCODERS:
        setting = Setting(encoder=encoder)
        linear = _read(run / f"{setting.file_stem('linear_eval')}.json", LinearEval)
        if linear:
            top5 = _percent(linear["top5_accuracy"]) if "top5_accuracy" in linear else "–"
            yield Measured(
                "linear-eval", encoder, _percent(linear["accuracy"]), top5, _protocol(linear)
            )
        knn = _read(run / f"{setting.file_stem('knn')}.json", KNN)
        if knn:
            how = f"{knn['neighbours']} neighbours, temperature {knn['temperature']:g}"
            how += _left_out(knn)
            yield Measured("knn", encoder, _percent(knn["accuracy"]), "–", how)


def _left_out(result: LinearEval | KNN) -> str:
    """How many images the command could not read, if any."""
    parts = [f"{count} {part}" for part, count in result["broken_images"].items() if count]
    return f"; images not readable: {', '.join(parts)}" if parts else ""


def _protocol(linear: LinearEval) -> str:
    """The paper's protocol, or where this one departs from it."""
    usual = dataclasses.asdict(LinearProtocol(seed=linear["protocol"].seed))
    other = [
        f"{name.replace('_', ' ')} {_show(value)} (paper: {_show(usual[name])})"
        for name, value in dataclasses.asdict(linear["protocol"]).items()
        if name != "augment" and value != usual[name]
    ]
    protocol = "other than the paper's: " + ", ".join(other) if other else "the paper's protocol"
    how = f"{protocol}; features of the {linear['features']}; {linear['measured']}"
    return how + _left_out(linear)


def _pictures(drawn: list[Path]) -> list[tuple[str, str, str]]:
    """(name, caption, data: address) of each, in the order of CAPTIONS."""
    paths = {path.stem: path for path in drawn}
    return [
        (name, caption, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for name, caption in CAPTIONS.items()
        if (path := paths.get(name)) is not None
    ]


def _collapsed_since(events: list[tuple[int, str, str]]) -> int | None:
    """The step of the last collapse, if the run has not recovered from it."""
    since = None
    for step, kind, _ in events:
        if kind == COLLAPSE:
            since = step
        elif kind == RECOVERED:
            since = None
    return since


def _options(config: Config) -> tuple[dict[str, list[Option]], str]:
    """The options in their groups, and what they are compared with."""
    try:
        usual = _usual(config)
        compared = f"the recipe {config.recipe}" if config.recipe else "the defaults"
    except OptionError:  # a recipe of the user's own that has moved since, or been changed
        usual, compared = {}, ""
    groups: dict[str, list[Option]] = {}
    for title, names in OPTIONS.items():
        groups[title] = []
        for name in names:
            if config.loss in OF_LOSSES.get(name, (config.loss,)):
                value = getattr(config, name)
                other = _show(usual[name]) if usual.get(name, value) != value else None
                groups[title].append(Option(name, _show(value), other))
    return groups, compared


def _usual(config: Config) -> dict[str, Any]:
    """The options as the recipe, or without one the program, would have had them.

    What depends on the loss and on the sizes is that of the run's own loss and sizes: a run with
    another batch size departs in this, and not in the learning rate its recipe has for it too.
    """
    size = config.image_size
    begun = {"recipe": config.recipe, "data": config.data}
    own = recipes.options(begun).resolved(size)
    same = {name: getattr(config, name) for name in ("loss", "batch_size", "epochs")}
    usual = dataclasses.asdict(recipes.options(begun | same).resolved(size))
    usual |= {name: getattr(own, name) for name in same}
    if config.recipe:
        usual["data"] = recipes.read(config.recipe).get("options", {}).get("data", config.data)
    not_compared = {"out", "recipe", "seed", *FREE_ON_RESUME}
    return {name: value for name, value in usual.items() if name not in not_compared}


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
