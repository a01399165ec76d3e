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

import dataclasses
import math
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from vne_kernels.pretrain.config import OptionError, Options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = {"description", "source", "not_stated", "options", "batch_size"}
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
NOT_OF_RECIPES = (
    *("out", "recipe", "accelerator", "devices", "workers", "download_dir"),
    *("checkpoint_every", "keep_checkpoints"),
)
#: Option -> its type. A recipe says what is computed, not where and how fast.
ALLOWED: dict[str, type] = {
    field.name: TYPES[str(field.type).split(" | ")[0]]
    for field in dataclasses.fields(Options)
    if field.name not in NOT_OF_RECIPES
}


def names() -> list[str]:
    """The recipes that come with the package."""
    folder = files(__name__)
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def text(name: str) -> str:
    """A recipe's file, by its name or its path.

    Raises:
        OptionError: there is none.
    """
    path = Path(name) if name.endswith(".toml") else files(__name__) / f"{name}.toml"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        wanted = f"a .toml file, or one of {', '.join(names())}"
        raise OptionError("recipe", wanted, name) from error


def read(name: str) -> dict[str, Any]:
    """A recipe's content, checked for names that mean nothing.

    Raises:
        OptionError: it cannot be read, or says what no recipe can say.
    """
    try:
        content: dict[str, Any] = tomllib.loads(text(name))
    except tomllib.TOMLDecodeError as error:
        raise OptionError("recipe", "a readable TOML file", f"{name} ({error})") from error
    tables = {"options": content.get("options", {}), **_by_batch_size(name, content)}
    unknown = set(content) - KEYS
    for table in tables.values():
        unknown |= table.keys() - ALLOWED.keys()
    if unknown:
        wanted = f"a recipe of known keys ({', '.join(sorted(KEYS))}) and options"
        raise OptionError("recipe", wanted, f"{name} with {', '.join(sorted(unknown))}")
    for table in tables.values():
        for option, value in table.items():
            kind = ALLOWED[option]
            if type(value) is not kind and not (kind is float and type(value) is int):
                wanted = f"a recipe whose {option} is of type {kind.__name__}"
                raise OptionError("recipe", wanted, f"{name} with {value!r}")
    return content


def _by_batch_size(name: str, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables = content.get("batch_size", {})
    if not isinstance(tables, dict) or not all(size.isdecimal() for size in tables):
        wanted = "a recipe whose batch_size holds tables like [batch_size.64]"
        raise OptionError("recipe", wanted, name)
    return tables


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
    tables = _by_batch_size(name, content)
    if tables:
        size = given.get("batch_size", chosen.get("batch_size", Options.batch_size))
        sizes = sorted(map(int, tables))
        below = [candidate for candidate in sizes if candidate <= size]
        chosen |= tables[str(below[-1] if below else sizes[0])]
    if chosen.get("warmup_epochs", 0) >= given.get("epochs", math.inf):
        chosen.pop("warmup_epochs", None)  # a run shorter than the warm-up takes what fits
    if "data" not in chosen | dict(given):
        raise OptionError("data", f"given with --recipe {name}: an image folder", "nothing")
    return Options(**chosen | dict(given))
