"""Whether two runs of the same training are the same, as far as fp32 can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusco.demo.train import StepRecord
from fusco.errors import FuscoError

NUM_EARLY_STEPS = 20
EARLY_TOLERANCE = 1e-4
TOLERANCE = 2e-2
"""Nats a byte. Sums of fp32 taken in another order differ in the last bit, 5e-7 of these losses.
That stays so until, somewhere in training, two experts tie for a token's last place and the runs
choose differently; from there on they drift apart slowly: 2e-3 after 50 more steps where two runs
with the order of the batch changed were compared, on one machine."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The largest absolute difference of two runs' losses, in nats a byte.

    Attributes:
        early: over the training losses of the first NUM_EARLY_STEPS steps.
        train: over all training losses.
        held_out: over all held-out losses.
    """

    early: float
    train: float
    held_out: float

    def check(self) -> None:
        """Raises FuscoError where a difference is larger than its tolerance."""
        for name, got, tolerance in (
            (f"training losses of the first {NUM_EARLY_STEPS} steps", self.early, EARLY_TOLERANCE),
            ("training losses", self.train, TOLERANCE),
            ("held-out losses", self.held_out, TOLERANCE),
        ):
            # Written so that a loss that is not a number fails, too.
            if not got <= tolerance:
                raise FuscoError(
                    f"demo: the {name} of the ranks and of one process differ by up to {got:.1e} "
                    f"nats a byte, expected at most {tolerance:.0e}; this is a bug of fusco, "
                    "please report it with your machine and versions"
                )


def compare(ranks: Sequence[StepRecord], alone: Sequence[StepRecord]) -> Agreement:
    """The agreement of two runs with the same configuration, step by step."""
    train = [abs(a.loss - b.loss) for a, b in zip(ranks, alone, strict=True)]
    held_out = [
        abs(a.held_out_loss - b.held_out_loss)
        for a, b in zip(ranks, alone, strict=True)
        if a.held_out_loss is not None and b.held_out_loss is not None
    ]
    # numpy's maximum of what is not a number is not a number, Python's may be any.
    return Agreement(
        early=float(np.max(train[:NUM_EARLY_STEPS])),
        train=float(np.max(train)),
        held_out=float(np.max(held_out)),
    )
