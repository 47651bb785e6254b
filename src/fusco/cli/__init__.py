"""The command line `fusco`: one module a command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from fusco.cli.bench import bench
from fusco.cli.demo import demo
from fusco.cli.doctor import doctor
from fusco.cli.selftest import selftest
from fusco.cli.warmup import warmup

app = typer.Typer(
    name="fusco",
    help="Fused dispatch and combine for Mixture-of-Experts under expert parallelism.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(bench)
app.command()(selftest)
app.command()(doctor)
app.command()(warmup)


def _print_version(asked: bool) -> None:
    if asked:
        from fusco import __version__

        typer.echo(f"fusco {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    pass
