"""What one benchmark run measures, checked before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch

from fusco.errors import InputError, input_error

Pattern = Literal["uniform", "zipf", "single-node", "imbalanced", "trace"]
Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Switch = Literal["none", "fusion", "planner", "balancer", "each"]
Device = Literal["cpu", "cuda"]

PLAIN_BASELINE, KEPT_BASELINE = "gloo-all_to_all", "gloo-kept"
NCCL_BASELINE = "nccl"
DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE = "deepep-v1", "deepep-v2"
BASELINES: dict[str, tuple[str, ...]] = {
    "cpu": (PLAIN_BASELINE, KEPT_BASELINE),
    "cuda": (NCCL_BASELINE, DEEPEP_V1_BASELINE, DEEPEP_V2_BASELINE),
}
"""What there is to compare with, by device."""

LARGE_TOKENS = 1024
"""From so many tokens on a GPU works longer than its host."""

PATTERNS: tuple[str, ...] = get_args(Pattern)
DTYPES: tuple[str, ...] = get_args(Dtype)
SWITCHES: tuple[str, ...] = get_args(Switch)
MECHANISMS = ("fusion", "planner", "balancer")
"""What can be switched off."""
DEVICES: tuple[str, ...] = get_args(Device)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One configuration to measure.

    Attributes:
        num_ranks: ranks of the group.
        num_tokens: tokens of each rank.
        hidden_size: elements of a token's row.
        top_k: experts of each token.
        num_experts: experts of the whole group, in equal contiguous blocks.
        dtype: of the rows, a floating type of torch by name.
        engine: as `Shuffle` takes it; "auto" is the best one here.
        device: where all tensors are, "cpu" or "cuda".
        pattern: one of PATTERNS, or any label where a routing is given to `run_bench`.
        trace: the recorded routing that pattern "trace" reads.
        ranks_per_node: as `Shuffle` takes it; None is the nodes that are there.
        num_hosts: hosts of a test cluster on this machine, with equally many ranks; needs `nic`.
        nic: the rate of every rank's link there, such as "400mbit"; None: no test cluster.
        iterations: measured iterations of every contender.
        warmup: iterations before them that are not counted.
        seed: of rows and routings.
        ablation: what is switched off; "none" is everything on, "each" measures that and each
            mechanism switched off alone.
        in_place: measure fusco with expert outputs in `Shuffle.empty_like` too.
        num_sms: for each of these measure fusco with so many multiprocessors too.
        graph: measure the pair with `max_recv_tokens` too, called and in a CUDA graph.
        backward: measure forward and backward of the pair too.
        baselines: of the device's BASELINES, what to measure beside fusco; ratios are to the
            first. See `AllToAllBaseline`, whose second keeps its buffers, `NcclBaseline` and
            `DeepEpBaseline`.

    Raises:
        InputError: a value that cannot be measured.
    """

    num_ranks: int = 4
    num_tokens: int = 1024
    hidden_size: int = 2048
    top_k: int = 8
    num_experts: int = 64
    dtype: str = "bfloat16"
    engine: str = "auto"
    device: str = "cpu"
    pattern: str = "uniform"
    trace: Path | None = None
    ranks_per_node: int | None = None
    num_hosts: int = 1
    nic: str | None = None
    iterations: int = 30
    warmup: int = 3
    seed: int = 0
    ablation: str = "none"
    in_place: bool = False
    num_sms: tuple[int, ...] = ()
    graph: bool = False
    backward: bool = False
    baselines: tuple[str, ...] = (PLAIN_BASELINE,)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name in ("warmup", "seed") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < lowest:
                raise input_error(
                    "bench",
                    field.name,
                    got=str(value),
                    expected=f"at least {lowest}",
                    remedy="give a larger one",
                )
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("ablation", self.ablation, SWITCHES)
        _check_choice("device", self.device, DEVICES)
        if self.engine in DEVICES and self.engine != self.device:
            raise input_error(
                "bench",
                "device",
                got=f"{self.device!r} with engine {self.engine!r}",
                expected=f"{self.engine!r}",
                remedy="change one of the two",
            )
        if any(number < 1 for number in self.num_sms):
            raise input_error(
                "bench",
                "num_sms",
                got=str(min(self.num_sms)),
                expected="at least 1 each",
                remedy="give larger ones",
            )
        for name in ("num_sms", "graph", "backward"):
            if getattr(self, name) and self.device != "cuda":
                raise input_error(
                    "bench",
                    name,
                    got=f"{getattr(self, name)} on {self.device!r}",
                    expected="device 'cuda' with it",
                    remedy="leave it out on CPUs",
                )
        for baseline in self.baselines or ("",):
            _check_choice("baselines", baseline, BASELINES[self.device])
        if self.num_experts % self.num_ranks:
            raise input_error(
                "bench",
                "num_experts",
                got=f"{self.num_experts} on {self.num_ranks} ranks",
                expected="a multiple of num_ranks",
                remedy="the benchmark places equal blocks of experts; change one of the two",
            )
        if self.ranks_per_node is not None and self.num_ranks % self.ranks_per_node:
            raise input_error(
                "bench",
                "ranks_per_node",
                got=f"{self.ranks_per_node} with {self.num_ranks} ranks",
                expected="a divisor of num_ranks",
                remedy="change one of the two",
            )
        if self.num_ranks % self.num_hosts or (self.num_hosts > 1 and self.nic is None):
            raise input_error(
                "bench",
                "num_hosts",
                got=f"{self.num_hosts} with {self.num_ranks} ranks and nic {self.nic}",
                expected="a divisor of num_ranks, and a nic",
                remedy="change one of the two, or give the rate of the links",
            )
        if self.pattern == "trace" and self.trace is None:
            raise InputError(
                'bench: trace: got none, expected a file with pattern "trace"; give --trace FILE'
            )
        if self.pattern != "trace" and self.trace is not None:
            raise InputError(
                f"bench: pattern: got {self.pattern!r}, expected 'trace' where a trace is given; "
                "give --pattern trace"
            )

    @property
    def main_mode(self) -> str:
        """The mode of the figures that count: that of a running model, but where a small batch
        takes the host longer than the device."""
        return "queued" if self.device == "cuda" and self.num_tokens >= LARGE_TOKENS else "eager"

    @property
    def ablations(self) -> tuple[str, ...]:
        """What is switched off in each Shuffle that is measured."""
        return ("none", *MECHANISMS) if self.ablation == "each" else (self.ablation,)

    @property
    def ranks_of_host(self) -> tuple[int, ...]:
        """How many ranks each host has."""
        return (self.num_ranks // self.num_hosts,) * self.num_hosts

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def check_device(device: str) -> None:
    """Raises InputError unless there is such a device here."""
    _check_choice("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise input_error(
            "bench",
            "device",
            got="'cuda'",
            expected="'cpu', as torch finds no CUDA device",
            remedy="run it on a machine with GPUs, with a torch that is built for them",
        )


def check_pattern(pattern: str) -> None:
    """Raises InputError unless `pattern` is one that can be generated or read."""
    _check_choice("pattern", pattern, PATTERNS)


def _check_choice(argument: str, got: str, choices: tuple[str, ...]) -> None:
    if got not in choices:
        raise input_error(
            "bench",
            argument,
            got=repr(got),
            expected=f"one of {', '.join(choices)}",
            remedy="choose one of them",
        )
