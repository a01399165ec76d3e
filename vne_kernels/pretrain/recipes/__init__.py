"""Named protocols: a small TOML file each, which a person can read, copy and change.

    description = "..."            a line, for the list
    source = "..."                 where its numbers stand
    not_stated = "..."             what the source leaves open, and what was taken
    [options]                      options of ``vne-pretrain train``, with "_" for "-"
    [batch_size.64]                options that hold for batches of 64 and more

What is given on the command line comes before a recipe, and its ``batch_size`` tables before its
``options``. Of the tables that of the largest size not above the run's counts, else the smallest.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from vne_kernels.common.reading import printable, read_text
from vne_kernels.pretrain.config import OptionError, Options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_RECIPE = 1 << 16  # bytes
#: A recipe says what is computed, not where and how fast.
NOT_OF_RECIPES = (
    *("out", "recipe", "accelerator", "devices", "workers", "download_dir"),
    *("checkpoint_every", "keep_checkpoints"),
)


@functools.cache
def _recipe_type() -> Any:
    """What a recipe's content must be, strictly: no other keys, no text for a number."""
    import msgspec
    from msgspec import UNSET, Meta, UnsetType

    # Larger ones, which TOML has in hexadecimal, cannot even be shown in an error.
    whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    bounded = {int: whole, int | None: whole | None}
    options = msgspec.defstruct(
        "options",
        [
            (name, bounded.get(kind, kind) | UnsetType, UNSET)
            for name, kind in get_type_hints(Options).items()
            if name not in NOT_OF_RECIPES
        ],
        forbid_unknown_fields=True,
    )
    size = Annotated[int, Meta(ge=1, le=2**31)]
    fields: list[tuple[str, Any, Any]] = [
        *((name, str | UnsetType, UNSET) for name in ("description", "source", "not_stated")),
        ("options", options | UnsetType, UNSET),
        ("batch_size", dict[size, options] | UnsetType, UNSET),  # type: ignore[valid-type]
    ]
    return msgspec.defstruct("recipe", fields, forbid_unknown_fields=True)


def names() -> list[str]:
    """The recipes that come with the package."""
    folder = files(__name__)
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def text(name: str) -> str:
    """A recipe's file, by its name or its path.

    Raises:
        OptionError: there is none.
    """
    own = name.endswith(".toml")
    try:
        if not own and name not in names():
            raise FileNotFoundError("there is no such recipe")
        return read_text(Path(name if own else f"{files(__name__)}/{name}.toml"), MOST_RECIPE)
    except (OSError, ValueError) as error:
        wanted = f"a .toml file, or one of {', '.join(names())}"
        raise OptionError("recipe", wanted, f"{name} ({error})") from error


def read(name: str) -> dict[str, Any]:
    """A recipe's content, checked; the keys of ``batch_size`` are numbers.

    Raises:
        OptionError: it cannot be read, or says what no recipe can say.
    """
    import msgspec

    content = text(name)
    try:
        recipe = msgspec.convert(tomllib.loads(content), _recipe_type(), str_keys=True)
    except (ValueError, RecursionError) as error:  # of a number of 5,000 digits; of deep nesting
        wanted = "a readable TOML file of a recipe's keys"
        raise OptionError("recipe", wanted, f"{name} ({printable(error, 200)})") from error
    read: dict[str, Any] = msgspec.to_builtins(recipe)
    return read


def options(given: Mapping[str, Any]) -> Options:
    """The options of the recipe that is ``given``, if any, under the others that are given.

    Raises:
        OptionError: the recipe cannot be used, lacks its data, or an option is out of range.
    """
    name = given.get("recipe")
    if name is None:
        return Options(**given)
    content = read(name)
    chosen = {**content.get("options", {})}
    if tables := content.get("batch_size"):
        size = given.get("batch_size", chosen.get("batch_size", Options.batch_size))
        chosen |= tables[max((at for at in tables if at <= size), default=min(tables))]
    if chosen.get("warmup_epochs", 0) >= given.get("epochs", math.inf):
        chosen.pop("warmup_epochs", None)  # a run shorter than the warm-up takes what fits
    if "data" not in chosen | dict(given):
        raise OptionError("data", f"given with --recipe {name}: an image folder", "nothing")
    return Options(**chosen | dict(given))
