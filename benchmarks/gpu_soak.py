"""Thousands of dispatches and combines of random shapes and skews on GPUs, every bit checked.

    PYTHONPATH=src python3 benchmarks/gpu_soak.py --iterations 2000 --num-ranks 2 --output FILE

Every rank knows what all ranks hold, so it computes what must arrive by sorting, without the
library. Rows are kept for a few iterations, and must not have changed when they are dropped. Prints
one JSON object every hundred iterations, and ends early after `--seconds`, or where something
differed. Appends a record to `--output`. Fails unless all iterations were done and all was equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fusco
from fusco.machine import append_jsonl, circumstances
from fusco.testing.cases import device_of, expect_same
from fusco.testing.ranks import RankPool

PER_SHUFFLE = 50
PER_LINE = 100
NUM_KEPT = 3
NUM_TOLD = 10
"""Differences that a record describes."""
NUM_COMMON_SIZES = 3
NUM_ROWS = 4096
"""Of the table that all rows are taken from."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to run."""

    engine: str
    iterations: int
    num_ranks: int
    max_tokens: int
    seconds: float
    seed: int


@dataclass(kw_only=True)
class Tally:
    """What one rank has done so far, and what was not equal then."""

    done: int = 0
    rows: int = 0
    differed: list[str] = field(default_factory=list)

    def compare(self, got: Tensor, want: Tensor, what: str) -> None:
        """Note a difference; the other ranks go on, so this one must too."""
        # Where the rows are: telling what differs takes a copy to the host.
        if got.dtype == want.dtype and torch.equal(got, want):
            return
        try:
            expect_same(got, want, what)
        except AssertionError as difference:
            self.differed.append(f"iteration {self.done}: {difference}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One Shuffle."""

    hidden_size: int
    top_k: int
    num_experts: int
    alignment: int
    dtype: torch.dtype
    placement: tuple[int, ...]

    @classmethod
    def draw(cls, load: Load, generator: torch.Generator) -> Setting:
        def choose(*options: int) -> int:
            return options[int(torch.randint(len(options), (), generator=generator))]

        num_experts = load.num_ranks * choose(1, 4, 32)
        placement = torch.arange(num_experts) % load.num_ranks
        placement = placement[torch.randperm(num_experts, generator=generator)]
        return cls(
            hidden_size=choose(16, 264, 1024, 2048, 7168),
            top_k=choose(1, 2, 6, 8, 16),
            num_experts=num_experts,
            alignment=choose(1, 1, 8, 128),
            dtype=(torch.bfloat16, torch.float32, torch.float16)[choose(0, 0, 1, 2)],
            placement=tuple(placement.tolist()),
        )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Where everything lands, on the CPU.

    Attributes:
        rank, slot: by source, int64 `[T, K]`, -1 for none.
        source_row: int64 `[R]`, which row of all ranks' rows each row of this rank is; -1: padding.
    """

    rank: list[Tensor]
    slot: list[Tensor]
    source_row: Tensor


def expect_layout(topk_idx: list[Tensor], setting: Setting, rank: int) -> Expected:
    """The contract's order of rows: local expert, source rank, token, k."""
    placement = torch.tensor(setting.placement)
    by_place = torch.argsort(placement, stable=True)
    expert = torch.cat(topk_idx)
    flat = expert.flatten()
    place = torch.where(flat < 0, setting.num_experts, torch.argsort(by_place)[flat])
    order = torch.argsort(place, stable=True)[: int((flat >= 0).sum())]
    counts = torch.bincount(place, minlength=setting.num_experts + 1)[:-1]
    padded = (counts + setting.alignment - 1) // setting.alignment * setting.alignment
    rank_of_place = placement[by_place]
    ends = padded.cumsum(0)
    rows = torch.zeros(int(rank_of_place.max()) + 1, dtype=torch.int64)
    rows = rows.index_add(0, rank_of_place, padded)
    rank_begin = rows.cumsum(0) - rows
    begin = ends - padded - rank_begin[rank_of_place]
    within = torch.arange(len(order)) - (counts.cumsum(0) - counts)[place[order]]
    slot = torch.full_like(flat, -1)
    slot[order] = begin[place[order]] + within
    owner = torch.where(flat < 0, -1, placement[flat])
    source_row = torch.full((int(rows[rank]) if rank < len(rows) else 0,), -1)
    mine = (owner == rank).nonzero().flatten()
    source_row[slot[mine]] = mine // expert.shape[1]
    sizes = [len(each) for each in topk_idx]
    return Expected(
        rank=list(owner.view_as(expert).split(sizes)),
        slot=list(slot.view_as(expert).split(sizes)),
        source_row=source_row,
    )


def outputs_of(rank: int, slots: Tensor) -> Tensor:
    """The rows of the table that the experts of a rank return at `slots`."""
    return (rank * 977 + slots * 17 + 5) % NUM_ROWS


def expected_sums(
    table: Tensor, expected: Expected, weights: Tensor, load: Load, rank: int
) -> Tensor:
    """Multiply, then add, k ascending, a partial a rank; partials in rank order."""
    owner, slot = expected.rank[rank].to(table.device), expected.slot[rank].to(table.device)
    total = torch.zeros((len(owner), table.shape[1]), device=table.device)
    for peer in range(load.num_ranks):
        partial = torch.zeros_like(total)
        for k in range(owner.shape[1]):
            is_there = (owner[:, k] == peer)[:, None]
            term = table[outputs_of(peer, slot[:, k])].float() * weights[:, k, None]
            partial = torch.where(is_there, partial + term, partial)
        total = total + partial.to(table.dtype).float()
    return total.to(table.dtype)


def draw_routing(setting: Setting, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Expert ids, more or less skewed, with a few holes; experts may repeat."""
    skew = float(torch.rand((), generator=generator)) * 4 + 0.5
    shape = (num_tokens, setting.top_k)
    idx = (torch.rand(shape, generator=generator) ** skew * setting.num_experts).long()
    idx[torch.rand(shape, generator=generator) < 0.05] = -1
    return idx


def soak(rank: int, load: Load) -> Tally:
    """All iterations on one rank."""
    generator = torch.Generator().manual_seed(load.seed)
    device = device_of(load.engine)
    started, tally = time.monotonic(), Tally()
    while tally.done < load.iterations:
        setting = Setting.draw(load, generator)
        table = torch.randn((NUM_ROWS, setting.hidden_size), generator=generator)
        table = table.to(setting.dtype).to(device)
        kept: deque[tuple[Tensor, Tensor]] = deque()
        with fusco.Shuffle(
            num_experts=setting.num_experts,
            hidden_size=setting.hidden_size,
            top_k=setting.top_k,
            max_tokens=load.max_tokens,
            dtype=setting.dtype,
            engine=load.engine,
            placement=setting.placement,
            expert_alignment=setting.alignment,
        ) as shuffle:
            for _ in range(min(PER_SHUFFLE, load.iterations - tally.done)):
                iterate(rank, load, setting, shuffle, table, kept, generator, tally)
                tally.done += 1
                if tally.done % PER_LINE == 0 and rank == 0:
                    seconds = round(time.monotonic() - started, 1)
                    line = {"iterations": tally.done, "seconds": seconds, "rows": tally.rows}
                    print(json.dumps(line), flush=True)
        # All ranks leave together, or the others would wait for the first that does.
        is_late = time.monotonic() - started > load.seconds
        leaves = torch.tensor(float(is_late or bool(tally.differed)))
        torch.distributed.all_reduce(leaves)
        if leaves:
            break
    return tally


def iterate(
    rank: int,
    load: Load,
    setting: Setting,
    shuffle: fusco.Shuffle,
    table: Tensor,
    kept: deque[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    tally: Tally,
) -> None:
    """One dispatch and combine, sometimes another by the same plan."""
    sizes = torch.randint(load.max_tokens + 1, (load.num_ranks,), generator=generator)
    # Many come again, for what comes again goes another way.
    comes_again = torch.rand(load.num_ranks, generator=generator) < 0.6
    step = max(1, load.max_tokens // NUM_COMMON_SIZES)
    sizes = torch.where(comes_again, sizes // step * step, sizes)
    sizes[torch.rand(load.num_ranks, generator=generator) < 0.1] = 0
    routing = [draw_routing(setting, int(size), generator) for size in sizes]
    expected = expect_layout(routing, setting, rank)
    plan = None
    for _ in range(1 + int(torch.randint(2, (), generator=generator))):
        firsts = torch.randint(NUM_ROWS, (load.num_ranks,), generator=generator).tolist()
        picks = [
            (first + torch.arange(len(idx))) % NUM_ROWS
            for first, idx in zip(firsts, routing, strict=True)
        ]
        weights = [torch.rand(idx.shape, generator=generator) for idx in routing]
        x, mine = table[picks[rank].to(table.device)], weights[rank].to(table.device)
        if plan is None:
            d = shuffle.dispatch(x, routing[rank].to(table.device), mine)
        else:
            d = shuffle.dispatch(x, topk_weights=mine, plan=plan)
        plan = d.plan
        slots = torch.arange(len(d.tokens), device=table.device)
        y = shuffle.combine(table[outputs_of(rank, slots)], d)
        source = expected.source_row
        want = table[torch.cat(picks)[source].to(table.device)] if len(source) else d.tokens
        want = want.masked_fill((source < 0).to(table.device)[:, None], 0)
        tally.compare(d.tokens, want, "tokens")
        tally.compare(y, expected_sums(table, expected, mine, load, rank), "combine")
        kept.append((d.tokens, want))
        tally.rows += len(want)
    while len(kept) > NUM_KEPT:
        tally.compare(*kept.popleft(), "rows that were kept")


def main() -> int:
    """Run on all ranks, and record what they did; 1 if it was less than asked, or differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="append the record here, as a JSON line")
    parser.add_argument("--commit", help="what the record says instead of what git says here")
    settings = vars(parser.parse_args())
    output, commit = settings.pop("output"), settings.pop("commit")
    load = Load(**settings)
    if load.engine == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; run this on a machine with GPUs")
    began = time.monotonic()
    with RankPool(load.num_ranks, timeout_s=2 * load.seconds + 120) as pool:
        tallies: list[Tally] = pool.run(soak, load)
    done = min(tally.done for tally in tallies)
    differed = [
        f"rank {rank}, {text}" for rank, tally in enumerate(tallies) for text in tally.differed
    ]
    record = {
        "asked": load.iterations,
        "done": done,
        "seconds": round(time.monotonic() - began, 1),
        "rows": [tally.rows for tally in tallies],
        "num_differed": len(differed),
        "differed": differed[:NUM_TOLD],
        "ranks": load.num_ranks,
        "engine": load.engine,
        "max_tokens": load.max_tokens,
        "seed": load.seed,
        **circumstances(device_of(load.engine), commit),
    }
    print(json.dumps(record))
    if output is not None:
        append_jsonl(output, [record])
    if done < load.iterations:
        print(f"only {done} of {load.iterations} iterations were done")
    if differed:
        print(f"{len(differed)} differences, the first: {differed[0]}")
    return int(done < load.iterations or bool(differed))


if __name__ == "__main__":
    sys.exit(main())
