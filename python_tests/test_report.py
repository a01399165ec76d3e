"""``vne-pretrain report`` and the pictures in it, on run folders that are made up here."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from vne_kernels.common.files import write_json, write_table
from vne_kernels.pretrain import batch_size, plots, report
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import LOSSES, Config, OptionError, Options

STEPS, EPOCHS = 12, 4  # three steps in each epoch
STEP_COLUMNS = ["step", "epoch", "loss", "entropy", "cosine", "information", "beta", "lr"]
EPOCH_COLUMNS = ["epoch", "step", *STEP_COLUMNS[2:]]
EPOCH_COLUMNS += ["probe_entropy", "effective_rank", "online_linear", "online_knn"]
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(run: Path, **options: Any) -> Path:
    """A folder as an interrupted run leaves it: without results."""
    run.mkdir(parents=True, exist_ok=True)
    given = {"epochs": EPOCHS, "batch_size": 8, "projector_dim": 16, "precision": "32-true"}
    config = Options(**given | options).resolved(native_size=8)
    write_json(run / "config.json", dataclasses.asdict(config))
    write_json(
        run / "environment.json",
        {"vne_kernels": "0.1.0", "commit": "0123abcd", "torch": "2.14.1", "cuda": None}
        | {"device": "cpu (2 threads)", "command": "vne-pretrain --data 'my <data>'"},
    )
    values = [-1.5, 1.2, 0.5, 1.0, 2.0, 0.1]
    steps = [[i + 1, i // 3 + 1, *values] for i in range(STEPS)]
    write_table(run / "metrics.csv", STEP_COLUMNS, steps)
    epochs = [
        [i, 3 * i, *values, 1.1, math.exp(1.1), *([0.5, 0.75] if i % 2 == 0 else 2 * ["nan"])]
        for i in range(1, EPOCHS + 1)
    ]
    write_table(run / "epochs.csv", EPOCH_COLUMNS, epochs)
    header = ["epoch", "step", *(f"eigenvalue_{i}" for i in range(1, 9))]
    spectra = [[i, 3 * i, *np.linspace(2 / 8, 0, 8)] for i in range(EPOCHS + 1)]
    write_table(run / "spectrum.csv", header, spectra)
    write_table(run / "events.csv", ["step", "kind", "message"], [])
    return run


def finish(run: Path) -> Path:
    scores = dict.fromkeys(report.SCORES, 0.8125)
    evaluation = {"pixels": scores, "untrained": dict.fromkeys(scores, 0.25)}
    evaluation["trained"] = scores | {"knn": 0.9375}
    training = {"steps": STEPS, "steps_of_this_process": STEPS, "seconds_of_this_process": 3725.2}
    data = {"name": "digits", "train_images": 1437, "test_images": 360, "classes": 10}
    results = {"evaluation": evaluation, "training": training, "data": data}
    write_json(run / "results.json", results)
    return run


def add_event(run: Path, step: int, kind: str, message: str) -> None:
    with (run / "events.csv").open("a") as file:
        file.write(f'{step},{kind},"{message}"\n')


class Reader(html.parser.HTMLParser):
    """The text of a page, whose elements must all be closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            source = dict(attributes)["src"]
            assert source is not None
            self.images.append(source)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def read(run: Path) -> Reader:
    return Reader(report.write(run))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of SimCLR with its report."""
    run = finish(make_run(tmp_path_factory.mktemp("runs") / "my run", loss="simclr"))
    assert main(["report", str(run)]) == 0
    return run


# ---- the page ------------------------------------------------------------------------------------


def test_page_has_the_numbers_of_the_run(whole: Path) -> None:
    text = Reader(whole / "report.html").text
    numbers = ["1,437", "360", "81.25 %", "25.00 %", "93.75 %", "1 h 2 min", "0123abcd"]
    assert [number for number in numbers if number not in text] == []
    assert "--data 'my <data>'" in text  # escaped in the page
    assert "cuda" not in text  # unknown here


def test_page_needs_nothing_else(whole: Path) -> None:
    page = Reader(whole / "report.html")
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    source = (whole / "report.html").read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:image/png|#)""", source) == []
    assert "http:" not in source
    assert "https:" not in source
    drawn = sorted(path.read_bytes() for path in whole.glob("*.png"))
    assert sorted(base64.b64decode(x.split(",", 1)[1]) for x in page.images) == drawn
    assert all(content.startswith(PNG) for content in drawn)


def test_nothing_but_the_report_and_its_pictures_is_written(whole: Path) -> None:
    files = {"config.json", "environment.json", "results.json"}
    tables = {"metrics.csv", "epochs.csv", "spectrum.csv", "events.csv"}
    pictures = {f"{name}.png" for name in report.CAPTIONS}
    assert {path.name for path in whole.iterdir()} == files | tables | pictures | {"report.html"}


@pytest.mark.parametrize(
    ("present", "pictures"),
    [((), 0), (("metrics.csv",), 3), (("metrics.csv", "epochs.csv"), 5)],
)
def test_an_interrupted_run_with_the_files_it_has(
    present: tuple[str, ...], pictures: int, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "half way", epochs=9)
    for path in run.iterdir():
        if path.name not in ("config.json", *present):
            path.unlink()
    page = read(run)
    assert f"vne-pretrain --resume --out '{run}'" in page.text
    assert len(page.images) == pictures


def test_tables_without_a_row_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in run.glob("*.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert read(run).images == []


def test_results_of_linear_eval_and_knn(tmp_path: Path) -> None:
    """They take the place of the run's own evaluation, which may be absent."""
    run = finish(make_run(tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    del results["evaluation"]
    write_json(run / "results.json", results)
    assert "81.25 %" not in read(run).text
    protocol = {"epochs": 100, "batch_size": 256, "lr": 0.3, "momentum": 0.995}
    protocol |= {"weight_decay": 1e-6, "augment": False, "seed": 3}
    linear = {"accuracy": 0.5, "features": "plain view", "protocol": protocol}
    linear |= {"measured": "at the end", "broken_images": {"train": 2, "test": 0}}
    write_json(run / "linear_eval.json", linear | {"top5_accuracy": 0.75})
    other = linear | {"accuracy": 0.375, "protocol": protocol | {"lr": 0.125, "augment": True}}
    write_json(run / "linear_eval_untrained.json", other)
    knn = {"accuracy": 0.625, "neighbours": 200, "temperature": 0.1}
    write_json(run / "knn.json", knn | {"broken_images": {"train": 0, "test": 0}})
    text = read(run).text
    numbers = ["50.00 %", "75.00 %", "37.50 %", "62.50 %", "lr 0.125", "2 train", "200", "0.1"]
    assert [number for number in numbers if number not in text] == []


# ---- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "disk", "non-finite", "collapse", "recovered"])
def test_every_kind_of_event_is_shown(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_event(run, 7, kind, "what was seen of it")
    assert f"7 {kind} what was seen of it" in read(run).text


def test_a_collapse_lasts_until_it_recovers() -> None:
    events = [(3, "collapse", ""), (5, "disk", "")]
    assert report._collapsed_since(events) == 3
    assert report._collapsed_since([*events, (6, "recovered", "")]) is None


def test_broken_images_are_counted_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    count = report.SHOWN_IMAGES + 3
    for i in range(count):
        add_event(run, i + 1, "broken-image", f"cannot read <i>{i}</i>.png")
    page = read(run)
    assert str(count) in page.text
    assert "i" not in page.tags  # a file's name is no markup
    assert all(f"<i>{i}</i>.png" in page.text for i in range(count))


# ---- configuration -------------------------------------------------------------------------------


def test_every_option_has_its_place() -> None:
    listed = [name for names in report.OPTIONS.values() for name in names]
    fields = {field.name for field in dataclasses.fields(Config)}
    assert sorted(listed) == sorted(fields - {"out", "recipe"})  # these stand at the head
    assert plots.TITLES.keys() == batch_size.MARKS.keys() == LOSSES.keys()


def marked(config: Config) -> dict[str, tuple[str, str]]:
    groups, _ = report._options(config)
    options = [option for group in groups.values() for option in group]
    return {o.name: (o.value, o.usual) for o in options if o.usual is not None}


def test_options_other_than_the_defaults_are_marked() -> None:
    assert marked(Options().resolved(8)) == {}
    # What follows from the loss is no departure.
    assert marked(Options(loss="simclr", seed=5).resolved(8)) == {"loss": ("simclr", "vn-doe")}
    # Neither is the data set, without a recipe, or what follows from it.
    assert marked(Options(data="cifar10").resolved(32)) == {}
    # Nor is the warm-up that only a shorter training cuts.
    changed = Options(lr=0.25, epochs=3).resolved(8)
    assert marked(changed) == {"lr": ("0.25", "0.8"), "epochs": ("3", "36")}


def test_options_other_than_the_recipe_are_marked(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'description = "mine"\nsource = "none"\n'
        '[options]\ndata = "cifar10"\nlr = 0.125\nbatch_size = 64\nbackbone = "resnet18"\n'
    )
    own = {"recipe": str(recipe), "backbone": "resnet18", "lr": 0.125, "batch_size": 64}
    assert marked(Options(**own, data="cifar10").resolved(32)) == {}
    changed = own | {"data": "else.npz", "batch_size": 32, "lr": 0.5}
    assert marked(Options(**changed).resolved(32)) == {
        "data": ("else.npz", "cifar10"),
        "batch_size": ("32", "64"),
        "lr": ("0.5", "0.125"),
    }


def test_page_of_a_recipe_that_is_gone_and_of_one_loss(tmp_path: Path) -> None:
    gone = tmp_path / "gone.toml"
    text = read(make_run(tmp_path / "run", recipe=str(gone), loss="simclr")).text
    assert "gone.toml" in text
    assert "temperature 0.5" in text
    assert "beta start" not in text  # an option of other losses


# ---- errors --------------------------------------------------------------------------------------


def test_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RUN" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, "step\r\n1\r\n") for name in ("epochs.csv", "metrics.csv", "spectrum.csv")),
        *((name, None) for name in ("results.json", "epochs.csv", "metrics.csv")),
    ],
)
def test_file_that_cannot_be_used(name: str, content: str | None, tmp_path: Path) -> None:
    """Tables without the columns that are drawn; files that hold no numbers, or no JSON."""
    run = make_run(tmp_path / "run")
    if content is None:
        header = (run / name).read_text().splitlines()[0] if name.endswith("csv") else "{"
        content = header + "\n" + ",".join("?" * len(header.split(","))) + "\n"
    (run / name).write_text(content)
    with pytest.raises(OptionError, match=re.escape(name)):
        report.write(run)
    assert not (run / "report.html").exists()


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that draw_all would save, by name."""
    drawn: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> Path:
        drawn[path.stem] = figure
        return path

    monkeypatch.setattr(plots, "save", keep)
    return drawn


@pytest.mark.parametrize("loss", LOSSES)
def test_pictures_of_every_loss(loss: str, figures: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_all(make_run(tmp_path / "run", loss=loss), 8, 16, loss)
    has_own = loss in ("simclr", "shannon-doe")
    assert figures.keys() == report.CAPTIONS.keys() - (set() if has_own else {"information"})


def test_what_pictures_show_is_what_was_measured(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    for step, kind in ((3, "collapse"), (6, "recovered"), (9, "collapse")):
        add_event(run, step, kind, "")
    plots.draw_all(run, 8, 16, "simclr")
    steps, means, bound = figures["information"].axes[0].get_lines()
    assert list(steps.get_ydata()) == pytest.approx(STEPS * [1 / math.log(2)])  # in bits
    assert list(means.get_ydata()) == pytest.approx(EPOCHS * [1 / math.log(2)])
    assert list(means.get_xdata()) == [1.5, 4.5, 7.5, 10.5]  # the middles of the epochs
    assert list(bound.get_ydata()) == [3, 3]  # log2 of 8 images
    linear, neighbours = figures["accuracy"].axes[0].get_lines()
    assert linear.get_xydata().tolist() == [[2, 50], [4, 50]]  # of the epochs that were measured
    assert neighbours.get_xydata().tolist() == [[2, 75], [4, 75]]
    spans = figures["entropy"].axes[0].patches  # where the run was collapsed
    assert [(s.get_x(), s.get_x() + s.get_width()) for s in spans] == [(3, 6), (9, STEPS)]


def test_no_accuracy_where_none_was_measured(figures: dict[str, Figure], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = (run / "epochs.csv").read_text()
    (run / "epochs.csv").write_text(re.sub(r"0\.5,0\.75\b", "nan,nan", table))
    plots.draw_all(run, 8, 16)
    assert "accuracy" not in figures
