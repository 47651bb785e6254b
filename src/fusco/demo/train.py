"""Training the demo's model, sharded or alone, by one loop.

Every loss is a mean over the *global* batch, in nats a byte. A rank backpropagates its share of it
(its own mean divided by the number of ranks), so the gradients of all ranks sum to those of the
global batch: an all-reduce sums those of the replicated parameters, and combine's backward has
already summed those of a sharded expert, which saw the tokens of every rank.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fusco.api import Shuffle
from fusco.demo.data import Batch, Corpus, held_out_batch, sample_batch
from fusco.demo.model import ModelConfig, build_model
from fusco.errors import input_error

DEFAULT_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What both runs share; batch sizes are global."""

    num_steps: int = DEFAULT_STEPS
    seed: int = 0
    num_sequences: int = 16
    num_held_out_sequences: int = 32
    eval_every: int = 20
    learning_rate: float = 4e-3
    num_warmup_steps: int = 20
    balance_coefficient: float = 0.01
    model: ModelConfig = field(default_factory=ModelConfig)

    def check(self, num_ranks: int) -> None:
        """Raises InputError unless every rank gets an equal share of the sequences and experts."""
        shared = (self.num_sequences, self.num_held_out_sequences, self.model.num_experts)
        largest = math.gcd(*shared)
        if num_ranks < 2 or largest % num_ranks:
            fitting = [str(n) for n in range(2, largest + 1) if largest % n == 0]
            raise input_error(
                "demo",
                "num_ranks",
                got=str(num_ranks),
                expected=f"one of {', '.join(fitting)}",
                remedy="the ranks share the batch and the experts equally",
            )

    def max_tokens_per_rank(self, num_ranks: int) -> int:
        """The most tokens that a rank dispatches at once."""
        num_sequences = max(self.num_sequences, self.num_held_out_sequences)
        return num_sequences * self.model.sequence_length // num_ranks

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step; losses in nats a byte over the global batch.

    Attributes:
        expert_counts: how often its tokens chose each expert, layer by layer.
    """

    step: int
    loss: float
    balance_loss: float
    expert_counts: tuple[int, ...]
    held_out_loss: float | None
    time_ms: float


class Trainer:
    """One process of a run: all of it when `shuffle` is None, else one rank of the group."""

    def __init__(self, config: TrainConfig, corpus: Corpus, shuffle: Shuffle | None = None) -> None:
        self.config = config
        self.corpus = corpus
        self.rank, self.num_ranks = 0, 1
        self.model = build_model(config.model, seed=config.seed)
        if shuffle is not None:
            self.rank, self.num_ranks = shuffle.topology.rank, shuffle.topology.num_ranks
            self.model.shard_experts(shuffle)
        sharded = set(self.model.expert_parameters()) if shuffle is not None else set()
        self.replicated = [p for p in self.model.parameters() if p not in sharded]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.step = 0

    def advance(self) -> StepRecord:
        """Trains one step, and evaluates where the configuration says so."""
        start = time.perf_counter()
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        losses, counts_LE = self.backward()
        self.optimizer.step()
        self.step += 1
        loss, balance_loss = self._mean_over_ranks(losses)
        time_ms = 1e3 * (time.perf_counter() - start)
        evaluate = self.step == config.num_steps or self.step % config.eval_every == 0
        return StepRecord(
            step=self.step,
            loss=loss,
            balance_loss=balance_loss,
            expert_counts=tuple(counts_LE.flatten().int().tolist()),
            held_out_loss=self.evaluate() if evaluate else None,
            time_ms=time_ms,
        )

    def backward(self) -> tuple[Tensor, Tensor]:
        """Leaves the gradients of the global batch; returns this rank's loss and balance loss, and
        how often the global batch chose each expert, `[layers, E]`."""
        config = self.config
        batch = sample_batch(
            self.corpus.train,
            step=self.step,
            seed=config.seed,
            num_sequences=config.num_sequences,
            sequence_length=config.model.sequence_length,
        )
        loss = self._loss(batch)
        counts_LE = self._expert_counts()
        balance_loss = self._balance_loss(counts_LE)
        self.optimizer.zero_grad()
        ((loss + config.balance_coefficient * balance_loss) / self.num_ranks).backward()
        self._sum_gradients()
        return torch.stack((loss, balance_loss)).detach(), counts_LE

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on text that is never trained on."""
        batch = held_out_batch(
            self.corpus,
            seed=self.config.seed,
            num_sequences=self.config.num_held_out_sequences,
            sequence_length=self.config.model.sequence_length,
        )
        return self._mean_over_ranks(self._loss(batch)[None])[0]

    def _loss(self, batch: Batch) -> Tensor:
        """The mean over this rank's sequences of a global batch."""
        mine = batch.shard(self.rank, self.num_ranks)
        logits = self.model(mine.inputs)
        return F.cross_entropy(logits.flatten(0, 1), mine.targets.flatten())

    def _expert_counts(self) -> Tensor:
        """How often the tokens of all ranks chose each expert, `[layers, E]`."""
        routings = [moe.routing for moe in self.model.moe_layers()]
        counts_LE = torch.stack([routing.expert_counts() for routing in routings])
        if self.num_ranks > 1:
            dist.all_reduce(counts_LE)
        return counts_LE

    def _balance_loss(self, counts_LE: Tensor) -> Tensor:
        """The Switch Transformer's auxiliary loss (arXiv 2101.03961, eq. 4), mean over the layers.

        `E * sum_e fraction_e * mean_probability_e`, with the fractions taken over the global batch:
        so the mean over ranks is the value that one process would compute. 1 is perfect balance.
        """
        routings = [moe.routing for moe in self.model.moe_layers()]
        fractions_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        probabilities_LE = torch.stack([routing.mean_probability for routing in routings])
        return counts_LE.shape[1] * (fractions_LE * probabilities_LE).sum(-1).mean()

    def _sum_gradients(self) -> None:
        if self.num_ranks == 1:
            return
        gradients = [p.grad for p in self.replicated if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _mean_over_ranks(self, values: Tensor) -> list[float]:
        if self.num_ranks > 1:
            dist.all_reduce(values)
        return (values / self.num_ranks).tolist()
