"""Whether two runs of the same training are the same, as far as fp32 can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusco.demo.train import StepRecord
from fusco.errors import FuscoError

NUM_EARLY_STEPS = 20
EARLY_TOLERANCE = 1e-5
MOST_TIES = 8
TOLERANCE = 5e-2
"""Nats a byte, but for the ties. Sums of fp32 taken in another order differ in the last bit, 1e-6
of these losses. That stays so until, somewhere in training, two experts tie for a token's last
place and the runs choose differently, on some machines as soon as in the ninth step; one such token
is enough. From there on they drift apart: by 2e-3 after 50 more steps on one machine, by 2e-2 after
90 on another."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The largest absolute difference of two runs' losses, in nats a byte.

    Attributes:
        early: over the training losses of the first NUM_EARLY_STEPS steps, up to the step in which
            tokens of the runs choose different experts.
        num_alike: steps before that one.
        num_ties: choices that differ in that one.
        train: over all training losses.
        held_out: over all held-out losses.
    """

    early: float
    num_alike: int
    num_ties: int
    train: float
    held_out: float

    def check(self) -> None:
        """Raises FuscoError where a difference is larger than its tolerance."""
        if self.num_ties > MOST_TIES:
            raise FuscoError(
                f"demo: after {self.num_alike} steps the ranks and one process differ in "
                f"{self.num_ties} choices of experts, expected at most {MOST_TIES}, which tied; "
                "this is a bug of fusco, please report it with your machine and versions"
            )
        for name, got, tolerance in (
            ("first training losses", self.early, EARLY_TOLERANCE),
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
    moved = [
        sum(abs(x - y) for x, y in zip(a.expert_counts, b.expert_counts, strict=True)) // 2
        for a, b in zip(ranks, alone, strict=True)
    ]
    num_alike = next((step for step, number in enumerate(moved) if number), len(moved))
    held_out = [
        abs(a.held_out_loss - b.held_out_loss)
        for a, b in zip(ranks, alone, strict=True)
        if a.held_out_loss is not None and b.held_out_loss is not None
    ]
    # numpy's maximum of what is not a number is not a number, Python's may be any.
    return Agreement(
        early=float(np.max(train[: min(num_alike, NUM_EARLY_STEPS)], initial=0)),
        num_alike=num_alike,
        num_ties=moved[num_alike] if num_alike < len(moved) else 0,
        train=float(np.max(train)),
        held_out=float(np.max(held_out)),
    )
