"""The demo's text: the sources of the running Python's standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusco.errors import FuscoError

VOCABULARY_SIZE = 256
_HELD_OUT_EVERY = 10
_MAX_BYTES = 6_000_000
_HELD_OUT_SEED_OFFSET = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes of source files, `[num_bytes]` uint8; no file is in both parts."""

    train: Tensor
    held_out: Tensor
    num_files: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Byte ids and the id that follows each, both `[num_sequences, sequence_length]` int64."""

    inputs: Tensor
    targets: Tensor

    def shard(self, rank: int, num_ranks: int) -> Batch:
        """The sequences of one rank: an equal, contiguous part of the global batch."""
        return Batch(
            inputs=self.inputs.chunk(num_ranks)[rank], targets=self.targets.chunk(num_ranks)[rank]
        )


def load_corpus(folder: Path | None = None, max_bytes: int = _MAX_BYTES) -> Corpus:
    """Reads `*.py` of `folder` and its packages in a fixed order; every tenth file is held out.

    Args:
        folder: where to look; None: the standard library of the running Python.
        max_bytes: where to stop reading.

    Raises:
        FuscoError: the folder has too few sources; some minimal Pythons ship none.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    num_files = num_bytes = 0
    for path in _source_files(folder):
        if num_bytes >= max_bytes:
            break
        text = path.read_bytes()
        parts[num_files % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1].append(text)
        num_files += 1
        num_bytes += len(text)
    if not parts[1]:
        raise FuscoError(
            f"demo: text to learn from: got {num_files} Python files in {folder}, expected at "
            f"least {_HELD_OUT_EVERY}; use a Python that ships its standard library as sources"
        )
    train, held_out = (_to_tensor(b"\n".join(texts)) for texts in parts)
    return Corpus(train=train, held_out=held_out, num_files=num_files)


def sample_batch(
    text: Tensor, *, step: int, seed: int, num_sequences: int, sequence_length: int
) -> Batch:
    """The global batch of one step; the same on every rank and in every run with this seed."""
    generator = np.random.default_rng((seed, step))
    starts = generator.integers(0, len(text) - sequence_length, size=num_sequences)
    offsets = torch.from_numpy(starts)[:, None] + torch.arange(sequence_length + 1)
    windows = text[offsets].long()
    return Batch(inputs=windows[:, :-1], targets=windows[:, 1:])


def held_out_batch(corpus: Corpus, *, seed: int, num_sequences: int, sequence_length: int) -> Batch:
    """The batch on which every evaluation is done, so that its losses can be compared."""
    return sample_batch(
        corpus.held_out,
        step=_HELD_OUT_SEED_OFFSET,
        seed=seed,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
    )


def _source_files(folder: Path) -> list[Path]:
    """The folder's own modules, then those of its packages; no tests, nothing installed."""
    packages = sorted(
        child
        for child in folder.iterdir()
        if (child / "__init__.py").is_file() and child.name not in {"test", "idlelib", "lib2to3"}
    )
    return [path for place in (folder, *packages) for path in sorted(place.glob("*.py"))]


def _to_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
