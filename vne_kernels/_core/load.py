"""Loads the native modules and keeps the reason when one is not usable.

`_C` (schemas and CPU kernels) loads into every torch >= 2.10, or importing the package fails.
`_C_cuda<major>` is loaded only into a torch of the same CUDA major: its name tells before anything
is opened. Both use no Python API, so they are libraries for the dispatcher, not Python modules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_load_library: Callable[[str], None] = torch.ops.load_library


def _load_cpu(folder: Path) -> None:
    """Load `_C`, or raise an ImportError that says what to do."""
    library = folder / "_C.abi3.so"
    if not library.exists():
        raise ImportError(
            f"{library} does not exist: this is the source folder, which was not built. Run "
            "`pip install .` in the repository and import from outside of it (tests: `pytest`, not "
            "`python -m pytest`), or build in place with `pip install -e . --no-build-isolation`."
        )
    try:
        _load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} does not load into torch {torch.__version__}; vne_kernels needs "
            f"torch >= 2.10 and the kind of machine it was built for: {error}"
        ) from error


def _load_cuda(folder: Path, torch_cuda: str | None) -> str | None:
    """Load `_C_cuda<major>` into a torch built with CUDA `torch_cuda`, or say why not."""
    if torch_cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    library = folder / f"_C_cuda{torch_cuda.split('.')[0]}.abi3.so"
    others = ", ".join(sorted(path.name for path in folder.glob("_C_cuda*.abi3.so")))
    if not library.exists() and others:
        return f"torch {torch.__version__} needs {library.name}, but what was built is {others}"
    if not library.exists():
        return "vne_kernels was built without its CUDA module (VNE_KERNELS_CUDA=1 in setup.py)"
    try:
        _load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


_load_cpu(Path(__file__).parent.parent)
cuda_reason = _load_cuda(Path(__file__).parent.parent, torch.version.cuda)
"""Why this process has no CUDA kernels; None if it has them, be there a GPU or not."""
