"""What torch.compile must not trace; imported while it traces, as this loads torch._dynamo."""

from __future__ import annotations

import torch

from vne_kernels import distributed

exchanged_sizes = torch.compiler.disable(  # type: ignore[no-untyped-call]
    distributed.exchanged_sizes,
    reason="the sizes are read by the host; give max_rows, and they need not be",
)
