"""What torch's exporters that cannot take the operators answer, in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def refused_by_script(name: str) -> Callable[..., NoReturn]:
    """What torch.jit.script calls as ``__prepare_scriptable__`` of the function or module `name`.

    It compiles a subset of Python, without keyword-only arguments and process groups.
    """

    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script does not take {name}: use torch.compile, torch.export or "
            "torch.jit.trace"
        )

    return refuse


def refuse_onnx(name: str) -> None:
    """To be called by the fake kernel of the operator `name`, which torch.onnx.export runs."""
    onnx = sys.modules.get("torch.onnx")  # where it is not loaded, nothing is exported
    if onnx is not None and onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"vne_kernels::{name} cannot be exported to ONNX, whose operators have neither "
            "eigenvalues nor logarithms of matrices: export the model without its entropy, or by "
            "torch.export"
        )
