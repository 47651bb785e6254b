"""How a command ends when something is wrong: a short message and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

from fusco.cli.launch import is_speaker

FAILURE, USER_ERROR = 1, 2


@contextlib.contextmanager
def short_failures() -> Iterator[None]:
    """Print an error that fusco raised on purpose without its traceback, and exit.

    The exit code is 2 where the arguments or the machine are the cause, else 1. Errors of other
    kinds pass through with their traceback: they are bugs.
    """
    from fusco import errors
    from fusco.testing.ranks import RankFailure

    user_errors = (errors.InputError, errors.EngineUnavailableError)
    try:
        yield
    except user_errors as error:
        raise fail(str(error), USER_ERROR) from None
    except errors.FuscoError as error:
        raise fail(str(error), FAILURE) from None
    except RankFailure as failure:
        kinds = {getattr(errors, e.type_name, None) for e in failure.errors.values()}
        if None in kinds:
            raise
        messages = dict.fromkeys(error.message for error in failure.errors.values())
        code = USER_ERROR if kinds <= set(user_errors) else FAILURE
        raise fail("\n".join(messages), code) from None


def fail(message: str, code: int) -> typer.Exit:
    """Print what is wrong and return what to raise. Users' errors are the same on every rank."""
    if code != USER_ERROR or is_speaker():
        sys.stderr.write(f"Error: {message}\n")
    return typer.Exit(code)
