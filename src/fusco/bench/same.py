"""Before the clock starts: do all contenders do the same work?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusco.bench.batches import Batch, Outputs
from fusco.bench.contenders import Racer, expert_outputs
from fusco.bench.deepep import ElasticBufferBaseline
from fusco.bench.records import Entrant
from fusco.bench.static import StaticPair
from fusco.errors import FuscoError

IN_ORDER, IN_ANY_ORDER = ("tokens", "row_weights", "tokens_per_expert"), ("tokens_per_expert",)
"""What contenders must have equal, depending on whether they fix the order of an expert's rows."""


def compare(
    racers: Sequence[Racer], batches: Sequence[Batch], outputs: Outputs
) -> tuple[dict[Entrant, dict[str, float]], float]:
    """Run every batch once on each, and raise unless they did the same work.

    Returns:
        mean bytes sent to other ranks in each operation, and mean rows received.
    """
    wire_bytes = {racer.entrant: {"dispatch": 0.0, "combine": 0.0} for racer in racers}
    num_rows = 0.0
    for batch in batches:
        first = None
        for racer in racers:
            contender = racer.contender
            if isinstance(contender, StaticPair):
                assert first is not None, "an eager one comes first"
                # The expert outputs of the one before are still there.
                contender.load(batch)
                _raise_unless({"sums": _agree(batch, first[1], contender.run())})
                continue
            before = contender.wire_bytes
            d = contender.dispatch(*batch.arguments)
            between = contender.wire_bytes
            y = contender.combine(expert_outputs(contender, d.tokens, outputs), d)
            sent = wire_bytes[racer.entrant]
            sent["dispatch"] += (between - before) / len(batches)
            sent["combine"] += (contender.wire_bytes - between) / len(batches)
            if first is None:
                first = (d, y)
                num_rows += len(d.tokens) / len(batches)
            else:
                has_order = not isinstance(contender, ElasticBufferBaseline)
                expect_same(batch, first, (d, y), IN_ORDER if has_order else IN_ANY_ORDER)
    return wire_bytes, num_rows


def expect_same(
    batch: Batch,
    fusco: tuple[Any, Tensor],
    baseline: tuple[Any, Tensor],
    names: Sequence[str] = IN_ORDER,
) -> None:
    """Raises FuscoError unless what was dispatched is equal, and the sums agree to rounding."""
    same = {
        name: torch.equal(getattr(fusco[0], name), getattr(baseline[0], name)) for name in names
    }
    _raise_unless({**same, "sums": _agree(batch, fusco[1], baseline[1])})


def _agree(batch: Batch, fusco: Tensor, baseline: Tensor) -> bool:
    # Each contender rounds a token's sum a few times; no term is larger than this.
    weight = batch.routing.topk_weights.abs().sum(dim=1, keepdim=True)
    largest = weight * batch.x.float().abs()
    difference = (fusco.float() - baseline.float()).abs()
    bound = 4 * torch.finfo(batch.x.dtype).eps * largest + torch.finfo(batch.x.dtype).tiny
    return bool((difference <= bound).all())


def _raise_unless(same: dict[str, bool]) -> None:
    if not all(same.values()):
        wrong = ", ".join(name for name, is_same in same.items() if not is_same)
        raise FuscoError(
            f"bench: {wrong}: fusco and the baseline differ, expected the same result; "
            "this is a bug of fusco, please report it with this configuration"
        )
