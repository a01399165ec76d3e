"""Mutations of files: functions of the bytes and of a generator of random numbers to bytes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

# ---- mutations of bytes ------------------------------------------------------------------------

Random = random.Random
Mutation = Callable[[bytes, Random], bytes]


def place(size: int, rng: Random) -> int:
    """An offset in a file: half of them in the first 128 or last 512 bytes."""
    match rng.randrange(4):
        case 0:
            return rng.randrange(min(size, 128))
        case 1:
            return size - 1 - rng.randrange(min(size, 512))
        case 2:  # headers and directories of large files: any scale of distance from an end
            distance = min(size - 1, int(size ** rng.random()))
            return rng.choice((distance, size - 1 - distance))
    return rng.randrange(size)


def span(data: bytes, rng: Random) -> tuple[int, int]:
    start = place(len(data), rng)
    return start, min(len(data), start + rng.randint(1, 64))


def flip_bits(data: bytes, rng: Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[place(len(data), rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    new = rng.choice((rng.randbytes(end - start), bytes(end - start), b"\xff" * (end - start)))
    return data[:start] + new + data[end:]


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: place(len(data), rng)]


def append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(1 << 20), data))


def duplicate(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    return data[:end] + data[start:]


def delete(data: bytes, rng: Random) -> bytes:
    start, end = span(data, rng)
    return data[:start] + data[end:]


def swap(data: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted((span(data, rng), span(data, rng)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


def set_integer(data: bytes, rng: Random) -> bytes:
    """Lengths, offsets and counts are such integers."""
    size = rng.choice((2, 4, 8))
    start = place(len(data), rng) // size * size
    value = rng.choice((0, 1, -1, 2 ** (8 * size - 1) - 1, 2**31, 2**32))
    new = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return data[:start] + new + data[start + size :]


BYTES = (flip_bits, overwrite, truncate, append, duplicate, delete, swap, set_integer)


def damage(data: bytes, rng: Random) -> bytes:
    """One to three of these mutations."""
    out = data
    while out == data:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            out = rng.choice(BYTES)(out, rng) if out else data
    return out


# ---- mutations of text and of content ----------------------------------------------------------

NESTED = 100_000
VALUES = (
    *("-1", "0", "100000", "1" + 30 * "0", 5000 * "9", "1e308", "NaN", "Infinity", "nan"),
    *("null", "true", '""', '"x"', f'"{(1 << 20) * "x"}"', "[]", '{"a": {}}', "[1, [2]]"),
    *(NESTED * "[" + NESTED * "]", r'"\u001b[2J\n\u0007"', r'"a $\\frac{$ b $"', '"<script>"'),
)


def damage_json(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half as a document: a leaf replaced, a key removed or added."""
    if rng.random() < 0.5:
        return damage(data, rng)
    document, mark = json.loads(data), "@MARK@"
    path = rng.choice(list(leaves(document)))
    parent, key = holder(document, path), path[-1]
    what = rng.choice(("replace",) * 5 + ("whole", "remove", "add", "twice"))
    if what == "twice":
        return data + data
    if what == "whole":
        document = mark
    elif what == "remove":
        del parent[key]
    elif what == "replace":
        parent[key] = mark
    else:
        document[rng.choice(("new", "\x1b[2J", "x" * 5000, ""))] = mark
    return json.dumps(document).replace(f'"{mark}"', rng.choice(VALUES)).encode()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all leaves and of what holds them."""
    if path:
        yield path
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def holder(content: Any, path: tuple[Any, ...]) -> Any:
    """What holds the leaf of this path."""
    return functools.reduce(lambda inner, key: inner[key], path[:-1], content)


def damage_config(data: bytes, rng: Random) -> bytes:
    """As JSON, and one in eight with a size that no machine has."""
    if rng.random() < 7 / 8:
        return damage_json(data, rng)
    huge = {"workers": 100_000, "batch_size": 10**9, "image_size": 10**6, "projector_dim": 10**9}
    name = rng.choice(list(huge))
    return json.dumps(json.loads(data) | {name: huge[name]}).encode()


def damage_text(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half a word or number replaced, or a line doubled or removed."""
    if rng.random() < 0.5:
        return damage(data, rng)
    text = data.decode()
    if rng.random() < 0.3:
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], 2 * [lines[at]], 20_000 * [lines[at]]))
        return "".join(lines).encode()
    found = rng.choice(list(re.finditer(r'"[^"\n]*"|[\w.+-]+', text)))
    return (text[: found.start()] + rng.choice(VALUES) + text[found.end() :]).encode()


def change_content(data: bytes, rng: Random) -> bytes:
    """One leaf of what torch.load gives is changed, and all is saved again."""
    import torch

    content = torch.load(io.BytesIO(data), weights_only=True)
    paths = [path for path in leaves(content) if not isinstance(holder(content, path), tuple)]
    path = rng.choice(paths)
    parent, key = holder(content, path), path[-1]
    if rng.random() < 0.2:
        del parent[key]
    elif isinstance(value := parent[key], torch.Tensor):
        parent[key] = rng.choice((value.new_zeros(3, 5), value * math.nan, 7))
    else:
        parent[key] = rng.choice((-7, 10**30, math.nan, "x", None, []))
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damage_saved(data: bytes, rng: Random) -> bytes:
    """Half of the time as bytes, half the content, where it is still torch.save's."""
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):
            return change_content(data, rng)
    return damage(data, rng)
