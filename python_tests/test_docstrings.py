"""The docstring of every public name has an example, and every example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch

import vne_kernels
from vne_kernels import functional

NO_EXAMPLE = {"DoEComponents", "EntropyEstimate", "available_backends"}
"""What another function returns; what depends on the installation."""
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (vne_kernels, functional)
    for module in pkgutil.iter_modules(package.__path__)
    if not module.name.startswith("_")
]


@pytest.mark.parametrize("name", [n for n in vne_kernels.__all__ if n not in NO_EXAMPLE])
def test_public_names_say_what_they_compute(name: str) -> None:
    text = inspect.getdoc(getattr(vne_kernels, name)) or ""
    assert ">>>" in text, "an example"
    if inspect.isfunction(getattr(vne_kernels, name)):
        for part in ("Args:", "Returns:", "Raises:"):
            assert part in text


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {public: getattr(vne_kernels, public) for public in vne_kernels.__all__}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = doctest.testmod(module, extraglobs={"torch": torch, **names})
    assert done.failed == 0
