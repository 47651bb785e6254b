"""`fusco bench`: measure dispatch and combine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusco.cli.failures import FAILURE, USER_ERROR, fail, short_failures
from fusco.cli.launch import (
    choose_num_ranks,
    default_num_ranks,
    is_speaker,
    launched_group,
    launched_ranks,
    leave_launched,
)

if TYPE_CHECKING:
    from fusco.bench import BenchConfig, Measurement

DEFAULT_TOP_K, DEFAULT_EXPERTS = 8, 64
DEFAULT_RANKS_PER_HOST, DEFAULT_NIC = 2, "400mbit"
NODE_PATTERNS = ("single-node", "imbalanced")


def bench(
    num_ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks to start.",
            show_default="4, or one a GPU; under torchrun, those it started; "
            "with --hosts, those of all hosts",
        ),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = 1024,
    hidden_size: Annotated[int, typer.Option(help="Elements of a row.")] = 2048,
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts of each token.", show_default="8, or the trace's"),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(help="Experts of all ranks.", show_default="64, or the trace's"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="bfloat16|float16|float32|float64", help="Of the rows.")
    ] = "bfloat16",
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="fusco's engine, of those that fusco doctor lists.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda", help="Where all tensors are.", show_default="cpu, or the engine's"
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="uniform|zipf|single-node|imbalanced|trace",
            help="Who chooses which experts.",
        ),
    ] = "uniform",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Recorded routing for --pattern trace."),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            help="Treat so many ranks as a node.",
            show_default="by host; half of the ranks for single-node and imbalanced",
        ),
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure on a test cluster of so many hosts: network namespaces on this machine. "
            "Linux and root only.",
            show_default="none",
        ),
    ] = None,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks of each host, with --hosts.",
            show_default=str(DEFAULT_RANKS_PER_HOST),
        ),
    ] = None,
    nic: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Of every rank's link between hosts, with --hosts.",
            show_default=DEFAULT_NIC,
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Iterations that count.")] = 30,
    warmup: Annotated[int, typer.Option(help="Iterations before them.")] = 3,
    seed: Annotated[int, typer.Option(help="Of rows and routing.")] = 0,
    ablation: Annotated[
        str,
        typer.Option(
            metavar="none|fusion|planner|balancer|each",
            help="Mechanism to switch off, or each by itself beside all of them on.",
        ),
    ] = "none",
    num_sms: Annotated[
        str,
        typer.Option(
            metavar="24,48,...",
            help="Measure also with so many multiprocessors of each GPU.",
            show_default=False,
        ),
    ] = "",
    graph: Annotated[
        bool, typer.Option("--graph", help="Measure with max_recv_tokens and in a CUDA graph too.")
    ] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="Measure forward and backward on GPUs too.")
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Also with expert outputs in Shuffle.empty_like."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Append one JSON object a measurement."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Print the times beside those of a record; exits with 1 if it has none.",
        ),
    ] = None,
) -> None:
    """Measure dispatch and combine beside all_to_all with permutes, and the floor.

    On CPUs, or with --device cuda on this machine's GPUs.

    The time goes from (x, topk_idx, topk_weights) to expert-major rows, and from expert outputs to
    token-major sums, planning included. Starts its own ranks, or runs under torchrun.
    """
    with short_failures():
        from fusco.bench import BASELINES, BenchConfig
        from fusco.bench.config import check_device
        from fusco.bench.trace import load_trace

        device = device or ("cuda" if engine == "cuda" else "cpu")
        check_device(device)
        default_experts, default_top_k = DEFAULT_EXPERTS, DEFAULT_TOP_K
        if trace is not None:
            recorded = load_trace(trace)
            default_experts, default_top_k = recorded.num_experts, recorded.top_k
        _check_hosts(hosts, num_ranks, ranks_per_host, nic)
        if hosts is not None:
            num_ranks = hosts * (ranks_per_host or DEFAULT_RANKS_PER_HOST)
        total = choose_num_ranks("bench", num_ranks, default_num_ranks(device))
        if (
            hosts is None
            and ranks_per_node is None
            and pattern in NODE_PATTERNS
            and launched_ranks() is None
        ):
            ranks_per_node = 1 if total % 2 else total // 2
        config = BenchConfig(
            num_ranks=total,
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            top_k=default_top_k if top_k is None else top_k,
            num_experts=default_experts if num_experts is None else num_experts,
            dtype=dtype,
            engine=engine,
            device=device,
            pattern=pattern,
            trace=trace,
            ranks_per_node=ranks_per_node,
            num_hosts=hosts or 1,
            nic=None if hosts is None else nic or DEFAULT_NIC,
            iterations=iterations,
            warmup=warmup,
            seed=seed,
            ablation=ablation,
            num_sms=_numbers("num_sms", num_sms),
            graph=graph,
            backward=backward,
            in_place=in_place,
            baselines=BASELINES[device],
        )
        _measure_and_report(config, output, compare)
        leave_launched(0)


def _measure_and_report(config: BenchConfig, output: Path | None, compare: Path | None) -> None:
    from rich.console import Console

    from fusco.bench import print_comparison, print_report, run_bench, write_jsonl

    record = None if compare is None else _read_record(compare)
    if output is not None and is_speaker():
        _check_writable(output)
    console = Console()
    with launched_group(config.device):
        if not is_speaker():
            run_bench(config)
            return
        with console.status(f"measuring on {config.num_ranks} ranks"):
            measurements = run_bench(config)
    print_report(measurements, console)
    is_found = record is None or print_comparison(measurements, record, console)
    if output is not None:
        write_jsonl(measurements, output)
        console.print(f"Wrote {len(measurements)} measurements to {output}")
    if not is_found:
        message = f"bench: --compare: {compare} has no measurement of what was measured here"
        raise fail(message, FAILURE)


def _check_hosts(
    hosts: int | None, num_ranks: int | None, ranks_per_host: int | None, nic: str | None
) -> None:
    """Refuse what would be left out of account."""
    if hosts is None:
        for option, value in (("--ranks-per-host", ranks_per_host), ("--nic", nic)):
            if value is not None:
                message = f"bench: {option}: got {value} without --hosts; add it, or leave this out"
                raise fail(message, USER_ERROR)
    elif num_ranks is not None:
        message = (
            f"bench: --num-ranks: got {num_ranks} with --hosts {hosts}; give --ranks-per-host "
            "instead, the number of ranks follows from the two"
        )
        raise fail(message, USER_ERROR)
    elif launched_ranks() is not None:
        message = (
            f"bench: --hosts: got {hosts} under torchrun; leave one out, it starts its own ranks"
        )
        raise fail(message, USER_ERROR)


def _numbers(argument: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        from fusco.errors import input_error

        raise input_error(
            "bench",
            argument,
            got=repr(text),
            expected="whole numbers with commas between them",
            remedy="give for example 24,48",
        ) from None


def _read_record(path: Path) -> list[Measurement]:
    from fusco.bench import read_jsonl

    try:
        return read_jsonl(path)
    except FileNotFoundError:
        message = (
            f"bench: --compare: got {path}, which is not there; write one with --output {path}"
        )
        raise fail(message, USER_ERROR) from None
    except (OSError, ValueError) as error:
        raise fail(f"bench: --compare: {error}", USER_ERROR) from None


def _check_writable(path: Path) -> None:
    """Find out before the run, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise fail(f"bench: --output: {error}", USER_ERROR) from None
