"""How much memory a Shuffle takes on a GPU, before there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch

from fusco.configuration import Configuration, as_integer
from fusco.errors import input_error
from fusco.layout.compact import BLOCK_ALIGNMENT, WindowLayout, chunk_bytes, part_starts

_NAME = "buffer_size_hint"


@dataclass(frozen=True, kw_only=True)
class BufferSizes:
    """Memory of one rank that its peers can write, bytes.

    Attributes:
        window_bytes: what every Shuffle has from the start: records, and partial sums on their way.
        heap_bytes: what dispatched rows lie in; it is taken when it is first needed.
    """

    window_bytes: int
    heap_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.window_bytes + self.heap_bytes


def buffer_size_hint(
    *,
    num_ranks: int,
    num_experts: int,
    hidden_size: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    num_alive: int = 1,
    imbalance: float = 1.0,
    expert_alignment: int = 1,
    max_recv_tokens: int | None = None,
) -> BufferSizes:
    """Predict what a `Shuffle` with the engine "cuda" takes on each GPU, without making one.

    There is no placement to give: every rank is taken to hold as many experts, which counts for
    padding.

    Args:
        num_ranks: ranks of the group.
        num_experts, hidden_size, top_k, max_tokens, dtype, expert_alignment, max_recv_tokens: as
            `Shuffle` takes them.
        num_alive: dispatches whose rows are alive at once, such as those of all layers that
            autograd holds; the backward of a combine is one too.
        imbalance: rows of the busiest rank over the mean, as `Stats.load_imbalance` counts them.
            All ranks grow together, so the busiest decides. With `max_recv_tokens` all have room
            for as many, whatever this is.

    Returns:
        window and heap of a rank. Small tables and plans come on top; as long as the busiest rank
        stays within `imbalance`, and no dispatch outgrows those before it, nothing else does.

    Raises:
        InputError: an argument is wrong, or not one that the engine serves. How many experts fit
            into the shared memory of a GPU is not looked at.
    """
    num_ranks, num_alive = as_integer(num_ranks), as_integer(num_alive)
    for name, value in (("num_ranks", num_ranks), ("num_alive", num_alive)):
        if not isinstance(value, int) or value < 1:
            raise _bad(name, value, "an integer above 0")
    if isinstance(imbalance, bool) or not isinstance(imbalance, Real):
        raise _bad("imbalance", imbalance, "a number")
    imbalance = float(imbalance)
    if not (math.isfinite(imbalance) and 1 <= imbalance <= num_ranks):
        raise _bad("imbalance", imbalance, f"from 1, all alike, to {num_ranks}, one has all")
    layer = Configuration(
        num_experts=num_experts,
        hidden_size=hidden_size,
        top_k=top_k,
        max_tokens=max_tokens,
        dtype=str(dtype),
        ranks_per_node=None,
        placement=None,
        expert_alignment=expert_alignment,
        max_recv_tokens=max_recv_tokens,
    )
    from fusco.engines.cuda import CudaEngine
    from fusco.engines.cuda.kernels.structs import MAX_PARTS

    def check_served(**numbers: int) -> None:
        for name, number in numbers.items():
            if number > CudaEngine.most[name]:
                raise _bad(name, number, f"at most {CudaEngine.most[name]}")

    check_served(num_ranks=num_ranks)
    layer.check(num_ranks, dtype, _NAME)
    check_served(top_k=layer.top_k, num_experts=layer.num_experts)
    row_bytes, unit = layer.hidden_size * dtype.itemsize, CudaEngine.row_unit_bytes
    if row_bytes % unit:
        expected = f"with {dtype} a multiple of {unit // dtype.itemsize}: rows of {unit} bytes"
        raise _bad("hidden_size", layer.hidden_size, expected)
    layout = WindowLayout(
        num_ranks=num_ranks,
        num_experts=layer.num_experts,
        max_tokens=layer.max_tokens,
        top_k=layer.top_k,
        row_bytes=row_bytes,
        max_parts=MAX_PARTS,
    )
    num_rows = layer.max_recv_tokens
    if num_rows is None:
        padding = (layer.expert_alignment - 1) * (layer.num_experts // num_ranks)
        num_rows = math.ceil(imbalance * layer.max_tokens * layer.top_k) + padding
    # Each tensor of a tuple begins at an aligned place of its own.
    block = part_starts([row_bytes], num_rows)[-1] + MAX_PARTS * BLOCK_ALIGNMENT
    return BufferSizes(
        window_bytes=layout.offsets()["end"], heap_bytes=num_alive * chunk_bytes(block)
    )


def _bad(name: str, value: object, expected: str) -> Exception:
    return input_error(
        _NAME,
        name,
        got=repr(value),
        expected=expected,
        remedy="see help(fusco.buffer_size_hint)",
    )
