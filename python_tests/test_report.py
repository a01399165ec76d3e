"""``vne-pretrain report`` and the pictures in it, on run folders that are made up here."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import math
import re
import shutil
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
    write_table(
        run / "metrics.csv",
        STEP_COLUMNS,
        [[i + 1, i // 3 + 1, *values] for i in range(STEPS)],
    )
    write_table(
        run / "epochs.csv",
        EPOCH_COLUMNS,
        [
            [i, 3 * i, *values, 1.1, math.exp(1.1), *([0.5, 0.75] if i % 2 == 0 else 2 * ["nan"])]
            for i in range(1, EPOCHS + 1)
        ],
    )
    spectrum = np.linspace(2 / 8, 0, 8)
    write_table(
        run / "spectrum.csv",
        ["epoch", "step", *(f"eigenvalue_{i}" for i in range(1, 9))],
        [[i, 3 * i, *spectrum] for i in range(EPOCHS + 1)],
    )
    write_table(run / "events.csv", ["step", "kind", "message"], [])
    return run


def finish(run: Path) -> Path:
    scores = dict.fromkeys(report.SCORES, 0.8125)
    write_json(
        run / "results.json",
        {
            "evaluation": {
                "pixels": scores,
                "untrained": dict.fromkeys(scores, 0.25),
                "trained": scores | {"knn": 0.9375},
            },
            "training": {
                "steps": STEPS,
                "steps_of_this_process": STEPS,
                "seconds_of_this_process": 3725.2,
            },
            "data": {"name": "digits", "train_images": 1437, "test_images": 360, "classes": 10},
        },
    )
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


def test_page_tells_what_came_of_the_run(whole: Path) -> None:
    text = Reader(whole / "report.html").text
    assert "my run finished" in text
    assert "1,437 training and 360 test images" in text
    assert "Linear probe 81.25 % test; untrained 25.00 %" in text
    assert "Nearest neighbours 93.75 % test; untrained 25.00 %" in text
    assert "Effective rank 3.0 of at most 8" in text
    assert "Training 1 h 2 min for 12 steps; 4 of 4 epochs" in text
    assert "None: no collapse was seen" in text
    assert "commit 0123abcd" in text
    assert "vne-pretrain --data 'my <data>'" in text  # escaped in the page
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


def test_nothing_but_the_report_and_its_pictures_is_written(whole: Path) -> None:
    files = {"config.json", "environment.json", "results.json"}
    tables = {"metrics.csv", "epochs.csv", "spectrum.csv", "events.csv"}
    pictures = {f"{name}.png" for name in report.CAPTIONS}
    assert {path.name for path in whole.iterdir()} == files | tables | pictures | {"report.html"}


def test_interrupted_run_says_how_far_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    text = read(make_run(tmp_path / "half way", epochs=9)).text
    assert "not finished: 4 of 9 epochs" in text
    assert f"vne-pretrain --resume --out '{tmp_path / 'half way'}'" in text
    assert "Accuracy on the test images" not in text


@pytest.mark.parametrize("kept", [(), ("metrics.csv",), ("metrics.csv", "epochs.csv")])
def test_files_that_are_not_there_are_left_out(kept: tuple[str, ...], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name not in ("config.json", *kept):
            path.unlink()
    page = read(run)
    assert f"not finished: {EPOCHS if 'epochs.csv' in kept else 0} of 4 epochs" in page.text
    assert len(page.images) == {0: 0, 1: 3, 2: 5}[len(kept)]
    assert "no events.csv" in page.text


@pytest.mark.parametrize("kind", ["checkpoint", "disk", "non-finite"])
def test_every_kind_of_event_is_told(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_event(run, 7, kind, "what was seen of it")
    text = read(run).text
    assert "what was seen of it" in text
    assert "None: no collapse was seen" not in text


def test_tables_without_a_row_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in run.glob("*.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert read(run).images == []


def test_finished_without_evaluation(tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "run"))
    results = json.loads((run / "results.json").read_text())
    del results["evaluation"]
    write_json(run / "results.json", results)
    assert "Not measured: vne-pretrain linear-eval and vne-pretrain knn do it." in read(run).text


def test_results_of_linear_eval_and_knn(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    protocol = {"epochs": 100, "batch_size": 256, "lr": 0.3, "momentum": 0.995}
    protocol |= {"weight_decay": 1e-6, "augment": False, "seed": 3}
    linear = {"accuracy": 0.5, "features": "plain view", "protocol": protocol}
    linear["measured"] = "test images, after the last of 100 epochs"
    linear["broken_images"] = {"train": 2, "test": 0}
    write_json(run / "linear_eval.json", linear | {"top5_accuracy": 0.75})
    other = linear | {"accuracy": 0.375, "protocol": protocol | {"lr": 0.1, "augment": True}}
    write_json(run / "linear_eval_untrained.json", other)
    knn = {"accuracy": 0.625, "neighbours": 200, "temperature": 0.1}
    write_json(run / "knn.json", knn | {"broken_images": {"train": 0, "test": 0}})
    text = read(run).text
    assert "Linear probe 50.00 % test top-1, vne-pretrain linear-eval" in text
    assert "Nearest neighbours 62.50 % test top-1, vne-pretrain knn" in text
    assert "linear-eval trained 50.00 % 75.00 % the paper's protocol; features of the plain" in text
    assert "linear-eval untrained 37.50 % – other than the paper's: lr 0.1 (paper: 0.3);" in text
    assert "after the last of 100 epochs; images not readable: 2 train" in text
    assert "200 neighbours, temperature 0.1 " in text


# ---- events --------------------------------------------------------------------------------------


def test_collapse_stands_at_the_head_until_it_recovers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_event(run, 3, "collapse", "effective rank 1.00 of 8 images")
    text = read(run).text
    assert "The representation has collapsed at step 3" in text
    assert "3 collapse effective rank 1.00 of 8 images" in text
    add_event(run, 6, "recovered", "no longer collapsed")
    text = read(run).text
    assert "has collapsed" not in text
    assert "3 collapse effective rank" in text
    assert "6 recovered no longer collapsed" in text


def test_broken_images_are_counted_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    count = report.SHOWN_IMAGES + 3
    for i in range(count):
        add_event(run, i + 1, "broken-image", f"cannot read <i>{i}</i>.png; another took its place")
    page = read(run)
    assert f"{count} image files could not be read; other images took their place" in page.text
    assert "3 more" in page.text
    assert "i" not in page.tags  # a file's name is no markup
    for i in range(count):
        assert f"step {i + 1}: cannot read <i>{i}</i>.png" in page.text


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


def test_recipe_that_is_gone_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", recipe=str(tmp_path / "gone.toml"))
    assert "gone.toml cannot be read here, so nothing is compared with it" in read(run).text


def test_options_of_other_losses_are_left_out(whole: Path) -> None:
    text = Reader(whole / "report.html").text
    assert "temperature 0.5" in text
    assert "beta start" not in text


# ---- errors --------------------------------------------------------------------------------------


def test_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "the folder of a run" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["epochs.csv", "metrics.csv", "spectrum.csv"])
def test_table_without_the_columns_that_are_drawn(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text("step\r\n1\r\n")
    with pytest.raises(OptionError, match=re.escape(name)):
        report.write(run)


@pytest.mark.parametrize("name", ["results.json", "epochs.csv", "metrics.csv"])
def test_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    header = (run / name).read_text().splitlines()[0] if name.endswith("csv") else "{"
    (run / name).write_text(header + "\n" + ",".join("?" * len(header.split(","))) + "\n")
    with pytest.raises(OptionError, match="a run's folder whose tables can be read"):
        report.write(run)
    assert not (run / "report.html").exists()


# ---- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that draw_all would save, by name."""
    kept: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> Path:
        kept[path.stem] = figure
        return path

    monkeypatch.setattr(plots, "save", keep)
    return kept


@pytest.mark.parametrize("loss", LOSSES)
def test_pictures_of_every_loss(loss: str, figures: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_all(make_run(tmp_path / "run", loss=loss), 8, 16, loss)
    has_own = loss in ("simclr", "shannon-doe")
    assert figures.keys() == report.CAPTIONS.keys() - (set() if has_own else {"information"})
    axes = figures["loss"].axes
    assert axes[0].get_title() == plots.TITLES[loss]
    assert len(axes) == (2 if loss.endswith(("doe", "doe-symmetric")) else 1)  # beta


def test_information_is_in_bits_below_its_bound(figures: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw_all(make_run(tmp_path / "run"), 8, 16, "simclr")
    (axes,) = figures["information"].axes
    steps, means, bound = axes.get_lines()
    assert list(steps.get_ydata()) == pytest.approx(STEPS * [1 / math.log(2)])
    assert list(means.get_ydata()) == pytest.approx(EPOCHS * [1 / math.log(2)])
    assert list(means.get_xdata()) == [1.5, 4.5, 7.5, 10.5]  # the middles of the epochs
    assert list(bound.get_ydata()) == [3, 3]  # log2 of 8 images


def test_accuracy_joins_the_epochs_that_were_measured(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    plots.draw_all(make_run(tmp_path / "run"), 8, 16)
    (axes,) = figures["accuracy"].axes
    linear, neighbours = axes.get_lines()
    assert linear.get_xydata().tolist() == [[2, 50], [4, 50]]
    assert neighbours.get_xydata().tolist() == [[2, 75], [4, 75]]


def test_no_accuracy_where_none_was_measured(figures: dict[str, Figure], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = (run / "epochs.csv").read_text()
    (run / "epochs.csv").write_text(re.sub(r"0\.5,0\.75\b", "nan,nan", table))
    plots.draw_all(run, 8, 16)
    assert "accuracy" not in figures


def test_collapses_are_shaded(figures: dict[str, Figure], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step, kind in ((3, "collapse"), (6, "recovered"), (9, "collapse")):
        add_event(run, step, kind, "")
    plots.draw_all(run, 8, 16)
    spans = figures["entropy"].axes[0].patches
    assert [(s.get_x(), s.get_x() + s.get_width()) for s in spans] == [(3, 6), (9, STEPS)]


def test_legends_hide_nothing(figures: dict[str, Figure], tmp_path: Path) -> None:
    """Every legend stands below its axes, and within the picture."""
    run = make_run(tmp_path / "run", loss="shannon-doe")
    add_event(run, 3, "collapse", "")
    plots.draw_all(run, 8, 16, "shannon-doe")
    for name, figure in figures.items():
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes) + 1, name
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name


def test_pictures_are_png(whole: Path) -> None:
    for path in whole.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
