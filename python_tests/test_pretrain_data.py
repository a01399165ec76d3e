"""Images, their order and their views: what is read, what is refused, what a seed decides."""

from __future__ import annotations

import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naming import last_error, naming
from PIL import Image
from tiny_run import write_folder
from torchvision.transforms import v2

from vne_kernels.pretrain import augment
from vne_kernels.pretrain.cli import main
from vne_kernels.pretrain.config import OptionError, Options
from vne_kernels.pretrain.data import (
    UNREADABLE_IN_A_ROW,
    EpochSampler,
    ImageSet,
    TwoViews,
    UnreadableImages,
    class_list,
    load,
    stratified,
    view_loader,
)

CIFAR = Path(__file__).parent / "data" / "cifar10_subset.npz"


# ---- sets --------------------------------------------------------------------------------------


def test_digits_are_split_the_same_way_every_time() -> None:
    data, again = load("digits", "unused"), load("digits", "unused")
    assert (len(data.train), len(data.test), data.classes, data.native_size) == (1437, 360, 10, 8)
    np.testing.assert_array_equal(data.test.labels, again.test.labels)
    np.testing.assert_array_equal(data.train.images, again.train.images)
    assert np.bincount(data.test.labels).min() >= 34  # stratified: a fifth of 174 or more


def test_cifar_images_are_real() -> None:
    data = load(str(CIFAR), "unused")
    assert (len(data.train), len(data.test), data.classes, data.native_size) == (80, 40, 10, 32)
    # The means of CIFAR-10's channels are 0.491, 0.482, 0.447: 80 images come near.
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.05)


def test_image_set_reads_grey_and_colour() -> None:
    grey = ImageSet(np.full((1, 2, 2), 7, np.uint8), np.zeros(1, np.int64))
    assert grey[0].getpixel((0, 0)) == (7, 7, 7)
    colour = ImageSet(np.array([[[[1, 2, 3]]]], np.uint8), np.zeros(1, np.int64))
    assert colour[0].getpixel((0, 0)) == (1, 2, 3)


def test_defaults_of_tiny_colour_images() -> None:
    config = Options(data=str(CIFAR)).resolved(load(str(CIFAR), "unused").native_size)
    assert (config.augment, config.stem, config.image_size) == ("simclr", "3x3", 32)


def test_image_folder_is_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 15})
    data = load(str(tmp_path), "unused")
    assert (len(data.train), len(data.test), data.classes) == (20, 5, 2)
    assert set(data.train.images).isdisjoint(data.test.images)
    assert Options(data=str(tmp_path)).resolved(data.native_size).stem == "7x7"


def test_labels_are_numbered_from_zero(tmp_path: Path) -> None:
    images, labels = np.zeros((6, 4, 4), np.uint8), np.array([7, 3, 9, 7, 3, 9])
    content = {"train_images": images, "train_labels": labels, "test_images": images[:2]}
    np.savez(tmp_path / "a.npz", test_labels=np.array([9, 3]), **content)
    data = load(str(tmp_path / "a.npz"), "unused")
    assert data.train.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert data.test.labels.tolist() == [2, 0]
    np.savez(tmp_path / "b.npz", test_labels=np.array([9, 4]), **content)
    with pytest.raises(OptionError, match=naming("--data", [4])):
        load(str(tmp_path / "b.npz"), "unused")


def test_a_part_of_the_training_images() -> None:
    whole = load(str(CIFAR), "unused")
    part = load(str(CIFAR), "unused", train_images=30)
    assert len(part.train) == 30
    assert np.bincount(part.train.labels).tolist() == [3] * 10
    assert (part.mean, part.std, len(part.test)) == (whole.mean, whole.std, 40)
    again = load(str(CIFAR), "unused", train_images=30)
    np.testing.assert_array_equal(part.train.images, again.train.images)
    assert len(load(str(CIFAR), "unused", train_images=500).train) == 80
    assert load(str(CIFAR), "unused", train_images=4).classes == 10


def test_stratified_takes_every_class_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = stratified(labels, 20)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert (np.diff(chosen) > 0).all()


# ---- bad .npz files ----------------------------------------------------------------------------


def write_npz(path: Path, **changes: np.ndarray | None) -> None:
    content = {
        "train_images": np.zeros((6, 4, 4), np.uint8),
        "train_labels": np.arange(6) % 2,
        "test_images": np.zeros((2, 4, 4), np.uint8),
        "test_labels": np.arange(2),
    } | changes
    np.savez_compressed(path, **{k: value for k, value in content.items() if value is not None})


BAD_NPZ = {
    "missing": ({"test_images": None}, "test_images"),
    "float": ({"train_images": np.zeros((6, 4, 4))}, "float64"),
    "flat": ({"train_images": np.zeros((6, 4), np.uint8)}, (6, 4)),
    "channels first": ({"train_images": np.zeros((6, 3, 4, 4), np.uint8)}, (6, 3, 4, 4)),
    "too few labels": ({"train_labels": np.arange(5)}, "train_labels"),
    "one class": ({"train_labels": np.zeros(6, int)}, "classes"),
    "pickle": ({"train_labels": np.array([None] * 6)}, "bad.npz"),
}


@pytest.mark.parametrize("fault", BAD_NPZ)
def test_bad_npz(fault: str, tmp_path: Path) -> None:
    changes, named = BAD_NPZ[fault]
    path = tmp_path / "bad.npz"
    write_npz(path, **changes)
    with pytest.raises(OptionError, match=naming("--data", named)):
        load(str(path), "unused")


@pytest.mark.parametrize("how", ["empty", "no zip", "an array", "cut short", "damaged"])
def test_npz_that_is_none(how: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    write_npz(path)
    content = bytearray(path.read_bytes())
    if how == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif how == "damaged":
        content[50:90] = bytes(40)  # in the first array's compressed bytes
        path.write_bytes(content)
    else:
        path.write_bytes({"empty": b"", "no zip": b"not a zip"}.get(how, content[:300]))
    with pytest.raises(OptionError, match=naming("--data", path)):
        load(str(path), "unused")


# ---- chosen classes ----------------------------------------------------------------------------


def test_class_lists_are_the_papers_table_6() -> None:
    ten, hundred = class_list("imagenet10"), class_list("imagenet100")
    assert (len(set(ten)), len(set(hundred))) == (10, 100)
    assert all(re.fullmatch(r"n\d{8}", name) for name in ten + hundred)
    # the table's corners, as it prints them
    assert (ten[0], ten[-1]) == ("n02002556", "n07717410")
    assert (hundred[0], hundred[9], hundred[-1]) == ("n01484850", "n01796340", "n13054560")
    assert set(ten) & set(hundred) == {"n04179913"}
    for name in ("imagenet10", "imagenet100"):
        assert files("vne_kernels").joinpath(f"pretrain/classes/{name}.txt").is_file()


def test_only_the_classes_of_the_list_are_read(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_folder(tmp_path / "images" / part, {"ant": 3, "bee": 4, "cow": 5})
    (tmp_path / "two.txt").write_text("# in any order\ncow\n\nant\nant\n")
    data = load(str(tmp_path / "images"), "unused", classes=str(tmp_path / "two.txt"))
    assert {Path(name).parent.name for name in data.train.images} == {"ant", "cow"}
    assert (len(data.train), len(data.test), data.classes) == (8, 8, 2)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("content", "named"), [(None, "imagenet10"), ("ant", "list.txt"), ("ant\nemu\nyak", "emu, yak")]
)
def test_bad_class_list(content: str | None, named: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"ant": 3, "bee": 4})
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=naming("--classes", named)):
        load(str(tmp_path / "images"), "unused", classes=str(path))


def test_classes_of_what_has_no_folders() -> None:
    with pytest.raises(OptionError, match=naming("--classes", "--data")):
        load("digits", "unused", classes="imagenet10")


# ---- wrong layouts -----------------------------------------------------------------------------

ANT_AND_BEE = {"ant": 2, "bee": 2}


def flat(path: Path, count: int) -> None:
    path.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (4, 4)).save(path / f"{i}.JPEG")


#: class folder -> images, or part -> its class folders or the number of images without a class
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "val without class folders": ({"train": ANT_AND_BEE, "val": 3}, "val"),
    "no classes at all": ({".": 3}, "images"),
    "train alone": ({"train": ANT_AND_BEE}, "train/"),
    "val alone": ({"val": ANT_AND_BEE}, "val/"),
    "an empty class": ({"train": ANT_AND_BEE, "val": {"ant": 2, "bee": 0}}, "bee"),
    "classes differ": ({"train": ANT_AND_BEE, "val": {"ant": 2, "cow": 2}}, "cow"),
    "too few to split": ({".": {"ant": 9, "bee": 1}}, "images"),
    "no folder at all": ({".": {}}, "images"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_layout(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, named = LAYOUTS[layout]
    root = tmp_path / "images"
    root.mkdir()
    for part, content in parts.items():
        (flat if isinstance(content, int) else write_folder)(root / part, content)
    assert main(["--data", str(root), "--out", str(tmp_path / "o")]) == 2
    assert re.search(rf"--data\b.*{named}", last_error(capsys))


def test_unlabeled_test_images_next_to_val(tmp_path: Path) -> None:
    """ImageNet as it unpacks, val/ sorted."""
    write_folder(tmp_path / "train", {"ant": 3, "bee": 3})
    write_folder(tmp_path / "val", {"ant": 2, "bee": 1})
    flat(tmp_path / "test", 3)
    data = load(str(tmp_path), "unused")
    assert (len(data.train), len(data.test)) == (6, 3)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bus": 5, "train": 5})
    assert load(str(tmp_path), "unused").classes == 2


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ant": 5, "bee": 5, ".ipynb_checkpoints": 1})
    assert load(str(tmp_path), "unused").classes == 2


# ---- images that cannot be read ----------------------------------------------------------------


def spoil(path: Path) -> None:
    """As a copy that was cut short leaves it."""
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("how", ["truncated", "no image", "missing", "empty"])
def test_broken_image_is_named_and_another_takes_its_place(how: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "dog": 10})
    data = load(str(tmp_path), "unused")
    broken = Path(data.train.images[3])
    if how == "truncated":
        spoil(broken)
    elif how == "missing":
        broken.unlink()
    else:
        broken.write_bytes(b"no image" if how == "no image" else b"")
    views = TwoViews(data.train, augment.make_views("simclr", data, 16), seed=0)
    batch = views.__getitems__([(0, 2), (0, 3), (0, 7)])
    assert batch.broken == (str(broken),)
    assert batch.first.shape == batch.second.shape == (3, 3, 16, 16)
    assert batch.labels.tolist() == data.train.labels[[2, 4, 7]].tolist()
    whole = views.__getitems__([(0, 2), (0, 4), (0, 7)])
    assert torch.equal(whole.first, batch.first)
    assert whole.broken == ()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_ends_the_run_in_one_line(workers: int) -> None:
    paths = [f"/nowhere/{i}.png" for i in range(2 * UNREADABLE_IN_A_ROW)]
    images = ImageSet(paths, np.zeros(len(paths), np.int64))
    sampler = EpochSampler(len(images), 4, seed=0)
    _, first = next(iter(sampler))
    loader = view_loader(images, lambda _: None, sampler, workers=workers, pin_memory=False)
    with pytest.raises(UnreadableImages) as caught:
        next(iter(loader))
    message = str(caught.value)
    parts = (
        "--data",
        UNREADABLE_IN_A_ROW + 1,
        f"/nowhere/{first}.png",
        "No such file or directory",
    )
    assert re.search(naming(*parts), message)
    assert "\n" not in message


def test_an_image_after_a_hundred_broken_ones_is_found(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    paths = [str(tmp_path / "good.png"), *["/nowhere"] * UNREADABLE_IN_A_ROW]
    place, _, broken = ImageSet(paths, np.zeros(len(paths), np.int64)).readable(1)
    assert (place, len(broken)) == (0, UNREADABLE_IN_A_ROW)


def test_a_set_without_a_readable_image() -> None:
    with pytest.raises(UnreadableImages, match=naming("--data", 3)):
        ImageSet(["/nowhere"] * 3, np.zeros(3, np.int64)).readable(1)


@pytest.mark.slow
def test_run_over_broken_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named once and counted, in the report as well; neither training nor probes die of them."""
    for part in ("train", "val"):
        write_folder(tmp_path / "images" / part, {"cat": 10, "dog": 10})
    for name in ("train/cat/1.png", "train/dog/3.png", "val/cat/0.png"):
        spoil(tmp_path / "images" / name)
    out = tmp_path / "run"
    small = ["--backbone", "resnet18", "--image-size", "16", "--batch-size", "8", "--epochs", "2"]
    small += ["--projector-dim", "8", "--precision", "32-true", "--workers", "1"]
    arguments = ["--data", str(tmp_path / "images"), "--out", str(out), "--accelerator", "cpu"]
    assert main([*arguments, *small]) == 0
    errors = capsys.readouterr().err
    for name in ("train/cat/1.png", "train/dog/3.png"):
        assert errors.count(str(tmp_path / "images" / name)) == 1
    events = (out / "events.csv").read_text()
    assert events.count("broken-image") == 2
    assert '"broken_images": 2' in (out / "results.json").read_text()
    assert "train/cat/1.png" in (out / "report.html").read_text()


# ---- order -------------------------------------------------------------------------------------


def test_batches_depend_on_seed_epoch_and_place_alone() -> None:
    data = load("digits", "unused")
    views = TwoViews(data.train, augment.make_views("affine", data, 8), seed=3)
    keys = list(EpochSampler(len(data.train), 4, seed=3))[:4]
    state = torch.random.get_rng_state()
    first = views.__getitems__(keys)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    again = views.__getitems__(keys)
    later = views.__getitems__([(1, image) for _, image in keys])
    assert torch.equal(first.first, again.first)
    assert torch.equal(first.second, again.second)
    assert not torch.equal(first.first, later.first)
    assert first.labels.tolist() == data.train.labels[[image for _, image in keys]].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine", "simclr", "simsiam", "byol"])
def test_batches_do_not_depend_on_the_number_of_workers(name: str) -> None:
    data = load(str(CIFAR), "unused")
    epochs = []
    for workers in (0, 2):
        loader = view_loader(
            data.train,
            augment.make_views(name, data, 32),
            EpochSampler(len(data.train), 16, seed=5),
            workers=workers,
            pin_memory=False,
        )
        epochs.append(list(loader))
    assert len(epochs[0]) == 5
    for one, two in zip(*epochs, strict=True):
        assert torch.equal(one.first, two.first)
        assert torch.equal(one.second, two.second)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sampler_goes_on_where_it_stopped(world: int, accumulate: int) -> None:
    images, batch = 23, 4 // world
    epoch = 5 // accumulate  # whole steps
    for rank in range(world):
        share = partial(EpochSampler, images, batch, 0, rank=rank, world=world)
        fresh = share(accumulate=accumulate)
        fresh.set_epoch(1)
        resumed = share(accumulate=accumulate, steps_done=epoch + 1)  # one step of epoch 1
        assert list(resumed) == list(fresh)[accumulate * batch :]
        resumed.set_epoch(2)
        assert len(list(resumed)) == len(resumed) == epoch * accumulate * batch
    orders = [list(EpochSampler(images, batch, 0, rank=r, world=world)) for r in range(world)]
    seen = [image for order in orders for _, image in order]
    assert len(set(seen)) == len(seen) == 20  # the last three images fill no batch


# ---- views -------------------------------------------------------------------------------------


def test_every_image_is_moved_in_its_own_way() -> None:
    data = load("digits", "unused")
    same = [data.train[0]] * 6
    first, second = augment.make_views("affine", data, 8)(same)
    views = torch.cat([first, second])
    distances = torch.cdist(views.flatten(1), views.flatten(1))
    assert (distances + torch.eye(12) > 0.1).all()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(augment, "BLUR_SIGMA", (sigma, sigma))
    whole = v2.functional.gaussian_blur(image, [augment.BLUR_KERNEL] * 2, [sigma] * 2)
    torch.testing.assert_close(augment.blur(image), whole, rtol=0, atol=1e-6)


# The paper's Table 5, column by column: jitter p, b, c, s, h; grey; blur; solarisation.
TABLE5 = {
    "simclr": [(0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0)] * 2,
    "simsiam": [(0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.0)] * 2,
    "byol": [
        (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 1.0, 0.0),
        (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.1, 0.2),
    ],
}


@pytest.mark.parametrize("name", TABLE5)
def test_policies_are_table_5(name: str) -> None:
    assert augment.POLICIES.keys() == TABLE5.keys()
    for policy, row in zip(augment.POLICIES[name], TABLE5[name], strict=True):
        names = ("jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur")
        assert tuple(getattr(policy, name) for name in (*names, "solarize")) == row
        assert policy.flip == 0.5
    assert (augment.BLUR_KERNEL, augment.BLUR_SIGMA) == (23, (0.1, 2.0))


def test_policy_of_tiny_images_is_table_4() -> None:
    tiny = augment.POLICIES["simclr"][0].for_tiny_images()
    assert tiny.jitter == 0.8
    assert (tiny.brightness, tiny.contrast, tiny.saturation, tiny.hue) == (0.4, 0.4, 0.4, 0.1)
    assert tiny.blur == 0
    assert augment.POLICIES["byol"][0].for_tiny_images().saturation == 0.2  # weaker already


@pytest.mark.parametrize(("size", "blurred"), [(32, False), (96, True)])
def test_transform_is_its_policy(size: int, blurred: bool) -> None:
    data = load(str(CIFAR), "unused")
    first, second = augment.RandomViews("byol", data, size).views
    kinds = [type(step) for step in first.transforms]
    assert kinds[:2] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip]
    assert tuple(first.transforms[0].size) == (size, size)
    blurs = [step for step in first.transforms[4:] if isinstance(step, v2.RandomApply)]
    assert [step.p for step in blurs] == ([1.0] if blurred else [])
    assert isinstance(second.transforms[-1], v2.RandomSolarize)
    jitter = first.transforms[2].transforms[0]
    assert jitter.brightness == pytest.approx((0.6, 1.4))
    assert jitter.hue == pytest.approx((-0.1, 0.1))


@pytest.mark.parametrize("name", TABLE5)
@pytest.mark.parametrize("size", [32, 80])
def test_views_are_normalized_and_differ(name: str, size: int) -> None:
    data = load(str(CIFAR), "unused")
    images = [data.train[i] for i in range(40)]
    torch.manual_seed(0)
    first, second = augment.make_views(name, data, size)(images)
    assert first.shape == second.shape == (40, 3, size, size)
    assert not torch.equal(first, second)
    views = torch.cat([first, second])
    assert views.mean().abs() < 0.3
    assert 0.6 < views.std() < 1.4


@pytest.mark.parametrize(("size", "rim"), [(32, 0), (224, 16)])
def test_plain_view_shows_tiny_images_whole_and_cuts_the_rim_of_others(size: int, rim: int) -> None:
    """A white rim of a sixteenth of the side is 0 or all of what 256 -> 224 cuts away."""
    data = load(str(CIFAR), "unused")
    side = size + 2 * rim
    image = Image.new("RGB", (side, side), "white")
    image.paste("black", (side // 16, side // 16, side - side // 16, side - side // 16))
    seen = augment.plain_view(data, size)(image)
    assert seen.shape == (3, size, size)
    black = -torch.tensor(data.mean) / torch.tensor(data.std)
    assert torch.allclose(seen[:, 0, 0], black, atol=1e-4) == (rim > 0)
