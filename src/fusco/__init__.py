"""fusco: the open MoE shuffle library. Start with `fusco.Shuffle`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusco.errors import (
    ClosedError,
    DisagreementError,
    EngineUnavailableError,
    FuscoError,
    InputError,
    PeerError,
    WindowMemoryError,
)

if TYPE_CHECKING:
    from fusco.api import Shuffle
    from fusco.exchanges import exchange
    from fusco.plans import Plan
    from fusco.sizing import BufferSizes, buffer_size_hint
    from fusco.topology import Topology
    from fusco.types import Ablation, Dispatched, Segments, Stats

__version__ = "0.1.0"

__all__ = [
    "Ablation",
    "BufferSizes",
    "ClosedError",
    "DisagreementError",
    "Dispatched",
    "EngineUnavailableError",
    "FuscoError",
    "InputError",
    "PeerError",
    "Plan",
    "Segments",
    "Shuffle",
    "Stats",
    "Topology",
    "WindowMemoryError",
    "__version__",
    "buffer_size_hint",
    "exchange",
]

_HOMES = {
    "Shuffle": "fusco.api",
    "exchange": "fusco.exchanges",
    "Plan": "fusco.plans",
    "BufferSizes": "fusco.sizing",
    "buffer_size_hint": "fusco.sizing",
    "Topology": "fusco.topology",
    "Ablation": "fusco.types",
    "Dispatched": "fusco.types",
    "Segments": "fusco.types",
    "Stats": "fusco.types",
}
"""Where the names are that need torch, which is imported with the first of them: it takes seconds,
and `fusco --help` needs none of it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusco' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
