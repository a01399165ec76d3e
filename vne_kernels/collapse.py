"""When a representation counts as collapsed, and what people are told of it: once, and at its end.

For the callbacks of training programs; imports nothing of them.
"""

from __future__ import annotations

import math


class CollapseWatch:
    """Tells when an entropy falls below a threshold, and when it is above again.

    Args:
        below: the threshold, in nats.
        what: whose entropy it is, such as "a fixed batch".
    """

    def __init__(self, below: float, what: str) -> None:
        self.below, self.what = below, what
        self.collapsed = False

    def told(self, entropy: float, rows: str) -> str | None:
        """What is to be said of an entropy in nats of rows, such as "128 images", if anything.

        `collapsed` says which of the two it is. An entropy of NaN is neither.
        """
        collapsed = entropy < self.below
        if collapsed == self.collapsed or math.isnan(entropy):
            return None
        self.collapsed = collapsed
        rank = f"effective rank {math.exp(entropy):.2f}"
        if not collapsed:
            return f"no longer collapsed: {rank}"
        return (
            f"the representation collapses: the entropy of {self.what} is {entropy:.3g} nats, "
            f"{rank} of {rows} (warned below {self.below:.3g} nats)"
        )
