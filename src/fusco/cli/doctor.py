"""`fusco doctor`: what was found on this machine, and why an engine is not available."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import typer

from fusco.cli.failures import FAILURE, short_failures

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "typer",
    "rich",
    "matplotlib",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what was found here: software, machine, engines and why one is missing.

    Where there are several GPUs, a kernel of each writes and reads the others' memory.

    The exit code is 1 if no engine can run, or an environment variable cannot be read or is none
    that fusco reads.
    """
    with short_failures():
        facts = examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
    if not facts["healthy"]:
        raise typer.Exit(FAILURE)


def examine() -> dict[str, Any]:
    """All that doctor shows, as it stands in its JSON."""
    import fusco
    from fusco.engines import probe
    from fusco.machine import hardware, source_commit

    engines = [
        {"name": found.name, "available": found.available, "reason": found.reason}
        for found in probe()
    ]
    variables = _variables()
    return {
        "fusco": fusco.__version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
        "devices": _devices(),
        "links": _links(),
        "fast_path": _fast_path(),
        "shared_memory": _shared_memory(),
        "engines": engines,
        "environment": variables,
        "healthy": any(engine["available"] for engine in engines)
        and not any(variable["problem"] for variable in variables),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine()}]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": found.name,
                "memory_gib": round(found.total_memory / 2**30, 1),
            }
        )
    return devices


def _links() -> list[dict[str, Any]]:
    """From every GPU to every other."""
    import torch

    if not _has_cuda_engine():
        return []
    pairs = permutations(range(torch.cuda.device_count()), 2)
    return [_try_link(source, target) for source, target in pairs]


def _has_cuda_engine() -> bool:
    from fusco.engines import probe

    return any(found.name == "cuda" and found.available for found in probe())


def _fast_path() -> dict[str, Any] | None:
    """Whether small calls on GPUs are served in C; None where there are none."""
    if not _has_cuda_engine():
        return None
    from fusco.engines.cuda.fast_path import problem

    return {"available": not problem(), "reason": problem() or "small calls are served in C"}


def _try_link(source: int, target: int) -> dict[str, Any]:
    from fusco.engines.cuda.peers import Link, try_link

    try:
        link = try_link(source, target)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what doctor is asked for)
        problem = f"cannot be tried: {str(error) or type(error).__name__}"
        link = Link(source=source, target=target, problem=problem)
    return asdict(link)


def _shared_memory() -> dict[str, Any]:
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return {
        "memfd": hasattr(os, "memfd_create"),
        "limit_gib": None if text == "max" else round(int(text) / 2**30, 1),
    }


def _variables() -> list[dict[str, Any]]:
    from fusco.env import VARIABLES, unknown
    from fusco.errors import InputError

    found: list[dict[str, Any]] = []
    for variable in VARIABLES:
        problem = None
        try:
            variable.get()
        except InputError as error:
            problem = str(error)
        found.append(
            {
                "name": variable.name,
                "value": os.environ.get(variable.name),
                "description": variable.description,
                "problem": problem,
            }
        )
    for name, problem in unknown().items():
        value = os.environ[name]
        found.append(
            {"name": name, "value": value, "description": "Nothing reads it.", "problem": problem}
        )
    return found


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title="fusco doctor")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("fusco", f"{facts['fusco']}, commit {facts['commit'] or 'unknown'}")
    table.add_row("python", f"{facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "[yellow]not installed[/yellow]")
    seen = facts["hardware"]
    table.add_row("machine", f"{seen['cpu']}, {seen['cores']} cores, {seen['memory_gib']} GiB")
    for device in facts["devices"]:
        size = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        table.add_row(device["device"], device["name"] + size)
    for link in facts["links"]:
        speed = f"writes {link['write_gbps']:.0f}, reads {link['read_gbps']:.0f} GB/s"
        verdict = f"[red]{escape(link['problem'])}[/red]" if link["problem"] else speed
        table.add_row(f"cuda:{link['source']} > cuda:{link['target']}", verdict)
    if (path := facts["fast_path"]) is not None:
        verdict = "" if path["available"] else "[yellow]not here[/yellow], slower: "
        table.add_row("fast path", verdict + escape(path["reason"]))
    shared = facts["shared_memory"]
    limit = "no limit" if shared["limit_gib"] is None else f"limit {shared['limit_gib']} GiB"
    table.add_row("shared memory", f"memfd {'yes' if shared['memfd'] else 'no'}, {limit}")
    table.add_section()
    for engine in facts["engines"]:
        verdict = "[green]available[/green]" if engine["available"] else "[red]not here[/red]"
        table.add_row(f"engine {engine['name']}", f"{verdict}: {escape(engine['reason'])}")
    table.add_section()
    for variable in facts["environment"]:
        value = escape("not set" if variable["value"] is None else variable["value"])
        if variable["problem"]:
            value = f"[red]{escape(variable['problem'])}[/red]"
        table.add_row(variable["name"], f"{value}\n[dim]{variable['description']}[/dim]")
    Console().print(table)
