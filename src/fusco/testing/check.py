"""A check of the contract, and what comes of it on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from fusco.testing.ranks import RankFailure, RankPool

Group = dist.ProcessGroup | None


class NotApplicable(Exception):
    """What a check is about is not there, and why; raised before any call, on all ranks alike."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check.

    Attributes:
        name: a short, unique name.
        description: what holds if it passes.
        fn: called as `fn(group, engine)` by every rank of the group.
        only: the one engine that it is about; empty: any.

    `fn` raises AssertionError, on the ranks where it is so, when something does not hold, and
    NotApplicable where it does not concern such a group or engine.
    """

    name: str
    description: str
    fn: Callable[[Group, str], None]
    only: str = ""

    def run(self, group: Group, engine: str) -> str | NotApplicable | None:
        """What failed on this rank, why nothing was checked, or None."""
        try:
            self.fn(group, engine)
        except NotApplicable as why:
            return why
        except (AssertionError, RuntimeError) as error:
            return f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        return None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a check.

    Attributes:
        failures: what failed, a line a rank; empty: nothing.
        why_skipped: why it does not apply; empty: it ran.
    """

    failures: Sequence[str] = ()
    why_skipped: str = ""

    @classmethod
    def of(cls, results: Sequence[str | NotApplicable | None]) -> Verdict:
        """From what `Check.run` returned on each rank; a failure on one outweighs all else."""
        failures = [each for each in results if isinstance(each, str)]
        why = next((str(each) for each in results if isinstance(each, NotApplicable)), "")
        return cls(failures=failures, why_skipped="" if failures else why)

    @classmethod
    def in_pool(cls, pool: RankPool, run: Callable[..., Any], *arguments: Any) -> Verdict:
        """From a function that runs the check on every rank of a pool."""
        try:
            return cls.of(pool.run(run, *arguments))
        except RankFailure as failure:
            errors = failure.errors.items()
            return cls(failures=[f"rank {r}: {e.type_name}: {e.message}" for r, e in errors])

    @property
    def word(self) -> str:
        """How the line about it begins."""
        return "FAIL" if self.failures else "skip" if self.why_skipped else "pass"

    @property
    def lines(self) -> Sequence[str]:
        """What is to be told under it."""
        return self.failures or ([self.why_skipped] if self.why_skipped else [])


def summary(num_passed: int, num_run: int, num_skipped: int) -> str:
    """The line under all checks."""
    skipped = f", {num_skipped} skipped" if num_skipped else ""
    return f"{num_passed} of {num_run} checks passed{skipped}"
