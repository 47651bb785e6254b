"""Where a command's ranks come from: started by torchrun or its like, or by the command itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

DEFAULT_RANKS = 4


def launched_ranks() -> int | None:
    """How many ranks a launcher started, this process among them; None if it started none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["WORLD_SIZE"])


def default_num_ranks(device: str) -> int:
    """How many ranks a command starts unless told."""
    if device == "cpu":
        return DEFAULT_RANKS
    import torch

    return torch.cuda.device_count()


def choose_num_ranks(operation: str, asked: int | None, default: int = DEFAULT_RANKS) -> int:
    """As many ranks as were launched; else as many as asked for, or the default.

    Raises:
        InputError: another number was launched than asked for.
    """
    launched = launched_ranks()
    if launched is None:
        return default if asked is None else asked
    if asked not in (None, launched):
        from fusco.errors import input_error

        raise input_error(
            operation,
            "num_ranks",
            got=str(asked),
            expected=f"{launched}, the ranks that were launched",
            remedy="leave it out under torchrun",
        )
    return launched


def is_speaker() -> bool:
    """Whether this process is the one that prints."""
    return launched_ranks() is None or os.environ["RANK"] == "0"


@contextlib.contextmanager
def launched_group(device: str = "cpu") -> Iterator[None]:
    """Join the default group of the launched ranks; nothing where none were launched."""
    if launched_ranks() is None:
        yield
        return
    import torch
    import torch.distributed as dist

    from fusco.testing.ranks import BACKENDS

    if device == "cuda":
        # NOTE: launchers that show each rank one GPU only give it no other number either.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group(BACKENDS[device])
    try:
        yield
    finally:
        from fusco.exchanges import forget_engines
        from fusco.transports.notices import forget_notices

        # What keeps the group alive until the interpreter ends lets its threads abort the process.
        forget_engines()
        forget_notices()
        dist.destroy_process_group()


def leave_launched(exit_code: int) -> None:
    """End a launched rank at once; nothing where none were launched.

    An interpreter that ends in order is now and then aborted by the threads that torch's process
    groups leave behind, and a rank that has passed would count as failed.
    """
    if launched_ranks() is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
