"""What torch.compile must not trace; imported while it traces, as this loads torch._dynamo."""

from __future__ import annotations

import torch

from vne_kernels._core import collectives

exchange_sizes = torch.compiler.disable(  # type: ignore[no-untyped-call]
    collectives.exchange_sizes,
    reason="the sizes are read by the host; give max_rows, and they need not be",
)
