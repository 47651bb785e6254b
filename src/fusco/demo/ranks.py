"""What the demo runs on the ranks of a pool: short calls, so that progress shows between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fusco.api import Shuffle
from fusco.demo.data import load_corpus
from fusco.demo.train import StepRecord, TrainConfig, Trainer

TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class RankRouting:
    """Each layer's routing of one rank's held-out tokens, `[layers, T, K]` int64 and fp32."""

    topk_idx: Tensor
    topk_weights: Tensor


@dataclass(frozen=True, kw_only=True)
class _Run:
    trainer: Trainer
    shuffle: Shuffle | None


_RUNS: list[_Run] = []
"""The run in progress, kept from call to call: at most one in a process."""


def begin(rank: int, config: TrainConfig) -> str:
    """Makes this rank's share of the model; returns the name of the engine in use."""
    shuffle = Shuffle(
        num_experts=config.model.num_experts,
        hidden_size=config.model.hidden_size,
        top_k=config.model.top_k,
        max_tokens=config.max_tokens_per_rank(dist.get_world_size()),
        dtype=torch.float32,
    )
    _RUNS.append(_Run(trainer=Trainer(config, load_corpus(), shuffle), shuffle=shuffle))
    return shuffle.engine_name


def begin_alone(rank: int, config: TrainConfig) -> None:
    """Makes the whole model on rank 0; the other ranks take no part until `end`."""
    if rank == 0:
        _RUNS.append(_Run(trainer=Trainer(config, load_corpus()), shuffle=None))


def advance(rank: int) -> StepRecord | None:
    """Trains one step; the same losses on every rank, None on one that takes no part."""
    return _RUNS[-1].trainer.advance() if _RUNS else None


def record_routing(rank: int) -> RankRouting:
    """What the routers decide now about this rank's share of the held-out text."""
    trainer = _RUNS[-1].trainer
    trainer.evaluate()
    routings = [moe.routing for moe in trainer.model.moe_layers()]
    return RankRouting(
        topk_idx=torch.stack([routing.topk_idx for routing in routings]),
        topk_weights=torch.stack([routing.topk_weights for routing in routings]),
    )


def write_text(rank: int, prompt: bytes, num_bytes: int) -> bytes:
    """Continues the prompt byte by byte; each rank draws its own text, all share the experts."""
    trainer = _RUNS[-1].trainer
    length = trainer.config.model.sequence_length
    generator = torch.Generator().manual_seed(trainer.config.seed + rank)
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_bytes):
            logits = trainer.model(torch.tensor([text[-length:]]))[0, -1]
            probabilities = (logits / TEMPERATURE).softmax(-1)
            text.append(int(probabilities.multinomial(1, generator=generator)))
    return bytes(text)


def end(rank: int) -> None:
    """Releases the model and its windows."""
    while _RUNS:
        run = _RUNS.pop()
        if run.shuffle is not None:
            run.shuffle.close()
