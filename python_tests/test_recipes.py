"""The named protocols: their numbers are the paper's tables, and each one trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from cases import in_tiers
from naming import naming
from PIL import Image

from vne_kernels.pretrain import recipes
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import LOSSES, Config, OptionError

pytestmark = pytest.mark.usefixtures("no_pictures")
CIFAR = Path(__file__).parent / "data" / "cifar10_subset.npz"

# Appendix C, Table 3: name, batch size -> base learning rate, weight decay, epochs
TABLE3 = [
    ("imagenet-100ep", 64, 0.45, 5.0e-6, 100),
    ("imagenet-100ep", 128, 0.45, 7.5e-6, 100),
    ("imagenet-200ep", 64, 0.45, 2.5e-6, 200),
    ("imagenet-200ep", 128, 0.45, 5.0e-6, 200),
    ("cifar10-100ep", 128, 0.5, 5.0e-5, 100),
    ("cifar10-800ep", 128, 0.25, 1.0e-4, 800),
    ("cifar100-100ep", 128, 0.5, 5.0e-5, 100),
    ("cifar100-800ep", 128, 0.25, 1.0e-4, 800),
    # Table 1a, base learning rate of 0.25; weight decay not stated there, hence Table 3's
    ("cifar10-table1a", 128, 0.25, 5.0e-5, 100),
    ("cifar100-table1a", 128, 0.25, 5.0e-5, 100),
    ("imagenet10", 64, 0.25, 5.0e-6, 100),
    ("imagenet100", 128, 0.25, 7.5e-6, 100),
]


def resolved(name: str, **given: object) -> Config:
    if name.startswith("imagenet"):
        given.setdefault("data", "images")
    return recipes.options({"recipe": name, **given}).resolved(224)


@pytest.mark.parametrize(("name", "batch", "lr", "decay", "epochs"), TABLE3)
def test_table_3(name: str, batch: int, lr: float, decay: float, epochs: int) -> None:
    config = resolved(name, batch_size=batch)
    assert (config.lr, config.weight_decay, config.epochs) == (lr, decay, epochs)
    assert config.warmup_epochs == 10
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("linear", 1, 10)
    assert (config.loss, config.backbone, config.augment) == ("vn-doe", "resnet50", "simclr")
    assert config.batch_norm == "per-view"


@pytest.mark.parametrize("name", recipes.names())
def test_table_4(name: str) -> None:
    config = resolved(name)
    small = name.startswith("cifar")
    assert (config.image_size, config.stem) == ((32, "3x3") if small else (224, "7x7"))
    assert config.projector_hidden == 2048
    assert (config.projector_layers, config.projector_dim) == ((1, 256) if small else (2, 512))


def test_every_recipe_of_table_3_is_checked() -> None:
    assert {row[0] for row in TABLE3} == set(recipes.names())


@pytest.mark.parametrize("batch", [8, 16, 32, 64, 100, 128, 256])
def test_weight_decay_of_other_batch_sizes(batch: int) -> None:
    """That of the largest stated size that is not above it; below all, of the smallest."""
    config = resolved("imagenet-100ep", batch_size=batch)
    assert config.weight_decay == (7.5e-6 if batch >= 128 else 5.0e-6)


@pytest.mark.parametrize("loss", in_tiers(LOSSES, first=("vn-doe", "simclr")))
def test_losses_in_a_recipe_keep_their_own_heads_and_views(loss: str) -> None:
    config = resolved("cifar10-100ep", loss=loss)
    widths = {
        "simclr": (2048, 128),
        "simsiam": (2048, 2048),
        "byol": (4096, 256),
        "barlow": (8192, 8192),
        "vicreg": (8192, 8192),
    }
    assert (config.projector_hidden, config.projector_dim) == widths.get(loss, (2048, 256))
    assert config.augment == (loss if loss in ("simsiam", "byol") else "simclr")
    assert config.lr == 0.5


def test_command_line_comes_before_the_recipe() -> None:
    config = resolved("imagenet-100ep", batch_size=64, weight_decay=1e-3, epochs=3, lr=0.1)
    assert (config.weight_decay, config.epochs, config.lr) == (1e-3, 3, 0.1)
    assert config.warmup_epochs == 2  # ten would be longer than the run
    with pytest.raises(OptionError, match=naming("--warmup-epochs", 3)):
        resolved("imagenet-100ep", epochs=3, warmup_epochs=3)


def test_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipes.text("cifar10-100ep").replace("epochs = 100", "epochs = 20"))
    config = resolved(str(path))
    assert (config.epochs, config.lr) == (20, 0.5)
    assert config.out == "runs/mine"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("options = 3 =", ("--recipe", "bad.toml")),
        ("[options]\nlearning_rate = 3", ("--recipe", "learning_rate")),
        ("[options]\nout = 'x'", ("--recipe", "out")),
        ("[option]\nlr = 3", ("--recipe", "option")),
        ("[options]\nlr = 'high'", ("--recipe", "options.lr")),
        ("[options]\nepochs = 1.5", ("--recipe", "options.epochs")),
        ("[options]\nepochs = true", ("--recipe", "options.epochs")),
        ("[options]\nepochs = 0", ("--epochs", 0)),
        ("[batch_size.many]\nlr = 1.0", ("--recipe", "batch_size")),
    ],
)
def test_bad_recipe(content: str, named: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(OptionError, match=naming(*named)):
        recipes.options({"recipe": str(path), "data": "digits"})


def test_unknown_recipe_and_missing_data() -> None:
    with pytest.raises(OptionError, match=naming("--recipe", "cifar11")):
        recipes.options({"recipe": "cifar11"})
    with pytest.raises(OptionError, match=naming("--data", "--recipe")):
        recipes.options({"recipe": "imagenet10"})


def test_list_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.names())
    assert main(["recipes", "imagenet10"]) == 0
    assert capsys.readouterr().out == recipes.text("imagenet10")


# ---- two epochs of each on real images ---------------------------------------------------------

# Small for time alone: the recipe's own network, loss and schedule stay.
SHORT = ["--epochs", "2", "--batch-size", "10", "--train-images", "20", "--workers", "0"]
SHORT += ["--precision", "32-true", "--accelerator", "cpu", "--no-evaluation", "--knn-every", "2"]


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's images as a folder, each class under a synset of the paper's Table 6."""
    folder = tmp_path_factory.mktemp("imagenet")
    synsets = {
        name: (recipes.files("vne_kernels") / f"pretrain/classes/{name}.txt").read_text().split()
        for name in ("imagenet10", "imagenet100")
    }
    with np.load(CIFAR) as file:
        for part, target in (("train", "train"), ("test", "val")):
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
            for count, names in ((2, synsets["imagenet100"]), (8, synsets["imagenet10"])):
                for k, name in enumerate(names):
                    (folder / target / name).mkdir(parents=True, exist_ok=True)
                    mine = images[labels == k % 10][:count]
                    for i, image in enumerate(mine):
                        Image.fromarray(image).save(folder / target / name / f"{i}.JPEG")
    return folder


def assert_trained(out: Path, loss: str) -> None:
    results = json.loads((out / "results.json").read_text())
    last = results["training"]["last_epoch"]
    assert last["epoch"] == 2
    assert results["config"]["loss"] == loss
    for name in ("loss", "entropy", "cosine", "probe_entropy", "online_linear", "online_knn"):
        assert math.isfinite(last[name]), name
    assert loss in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "encoder.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_recipe_trains(name: str, imagenet_like: Path, tmp_path: Path) -> None:
    # Images of one pixel before the pooling, for time; the stem and the projector stay as it says.
    data, size = (CIFAR, 8) if name.startswith("cifar") else (imagenet_like, 32)
    out = tmp_path / "run"
    arguments = ["--recipe", name, "--data", str(data), "--image-size", str(size)]
    assert main([*arguments, "--out", str(out), *SHORT]) == 0
    assert_trained(out, "vn-doe")
    if name in ("imagenet10", "imagenet100"):
        classes = json.loads((out / "results.json").read_text())["data"]["classes"]
        assert classes == int(name.removeprefix("imagenet"))


@pytest.mark.parametrize("loss", in_tiers(LOSSES, first=("vn-doe", "simclr")))
def test_loss_trains(loss: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    heads = ["--projector-hidden", "64", "--projector-dim", "32"]
    arguments = ["--data", str(CIFAR), "--loss", loss, "--backbone", "resnet18", *heads]
    assert main([*arguments, "--stem", "7x7", "--out", str(out), *SHORT]) == 0
    assert_trained(out, loss)
