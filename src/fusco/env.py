"""Every environment variable that fusco reads, or numba for it, typed. A bad value raises."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fusco.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Variable(Generic[T]):
    """One environment variable: its name, how it is read, and what it means."""

    name: str
    parse: Callable[[str], T]
    default: T
    description: str

    def get(self) -> T:
        """Its value now.

        Raises:
            InputError: the variable is set to something that cannot be read.
        """
        text = os.environ.get(self.name)
        if text is None:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise InputError(
                f"environment: {self.name}: got {text!r}, expected {error}; change or unset it"
            ) from None


def _engine(text: str) -> str:
    if text not in ("auto", "reference", "two_level", "cpu", "cuda"):
        raise ValueError("one of auto, reference, two_level, cpu, cuda")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number of seconds") from None
    if value <= 0:
        raise ValueError("a number of seconds above 0")
    return value


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


ENGINE = Variable(
    name="FUSCO_ENGINE",
    parse=_engine,
    default="auto",
    description='The engine that engine="auto" stands for.',
)
TIMEOUT_S: Variable[float | None] = Variable(
    name="FUSCO_TIMEOUT_S",
    parse=_seconds,
    default=None,
    description="Bound of every wait in seconds where timeout_s is None; unset: the group's.",
)
NODE_ID: Variable[int | None] = Variable(
    name="FUSCO_NODE_ID",
    parse=_natural,
    default=None,
    description="This rank's node; unset: the host it runs on.",
)
CACHE_DIR = Variable(
    name="FUSCO_CACHE_DIR",
    parse=str,
    default="~/.cache/fusco",
    description="Where compiled GPU kernels, and the C of small calls, are kept.",
)
BULK_COPIES = Variable(
    name="FUSCO_BULK_COPIES",
    parse=_switch,
    default=True,
    description="0: 16-byte loads and stores on every GPU, and no kernel begins while another ends,"
    " as on those before Hopper.",
)
FAST_PATH = Variable(
    name="FUSCO_FAST_PATH",
    parse=_switch,
    default=True,
    description="0: small calls on GPUs are served in Python, as where there is no C compiler.",
)
NUMBA_CACHE_DIR: Variable[str | None] = Variable(
    name="NUMBA_CACHE_DIR",
    parse=str,
    default=None,
    description="Where numba keeps the compiled loops of the cpu engine; unset: beside the sources,"
    " or ~/.cache/numba where that cannot be written.",
)
VARIABLES: tuple[Variable[Any], ...] = (
    ENGINE,
    TIMEOUT_S,
    NODE_ID,
    CACHE_DIR,
    BULK_COPIES,
    FAST_PATH,
    NUMBA_CACHE_DIR,
)


def unknown() -> dict[str, str]:
    """By name, what is wrong with variables that look like fusco's and are not."""
    names = [variable.name for variable in VARIABLES]
    problems = {}
    for name in sorted(os.environ):
        if name.startswith("FUSCO_") and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            remedy = f"is {close[0]} meant?" if close else "unset it"
            problems[name] = f"environment: {name}: fusco reads no such variable; {remedy}"
    return problems
