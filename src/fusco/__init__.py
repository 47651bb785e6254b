"""fusco: the open MoE shuffle library. Start with `fusco.Shuffle`."""

from fusco.api import Shuffle
from fusco.errors import (
    ClosedError,
    DisagreementError,
    EngineUnavailableError,
    FuscoError,
    InputError,
    PeerError,
    WindowMemoryError,
)
from fusco.exchange import exchange
from fusco.sizing import BufferSizes, buffer_size_hint
from fusco.topology import Topology
from fusco.types import Ablation, Dispatched, Plan, Segments, Stats

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
