"""A small byte-level language model: causal attention and mixture-of-experts blocks.

Built alone, every expert is in this process and fusco is nowhere; after `shard_experts` each rank
holds its share and `fusco.Shuffle` moves the tokens. Initial values are the same both ways.

Shape suffixes: B sequences, S positions, T = B*S tokens, D hidden size, E experts, K experts a
token, R rows for the experts of this process, V byte values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, compress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusco.api import Shuffle
from fusco.demo.data import VOCABULARY_SIZE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the demo's model: many experts, everything else as small as it can be."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_bytes_seen: int = 3
    sequence_length: int = 128
    num_experts: int = 32
    top_k: int = 4
    expert_size: int = 128


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one layer's router decided in the last forward pass."""

    topk_idx: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K] fp32, each row sums to 1
    mean_probability: Tensor  # [E] fp32, over the tokens of this process, differentiable

    def expert_counts(self) -> Tensor:
        """How often the tokens of this process chose each expert, `[E]` fp32."""
        return self.topk_idx.flatten().bincount(minlength=len(self.mean_probability)).float()


def build_model(config: ModelConfig, *, seed: int) -> LanguageModel:
    """The model with all its experts; every initial value follows from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config)


class LanguageModel(nn.Module):
    """Byte ids `[B, S]` int64 to logits `[B, S, V]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Embedding(VOCABULARY_SIZE, config.hidden_size) for _ in range(config.num_bytes_seen)
        )
        self.attentions = nn.ModuleList(Attention(config) for _ in range(config.num_layers))
        self.moes = nn.ModuleList(MoE(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY_SIZE, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self._embed(ids_BS)
        for attention, moe in zip(self.attentions, self.moes, strict=True):
            x_BSD = x_BSD + attention(x_BSD)
            x_BSD = x_BSD + moe(x_BSD)
        logits_BSV: Tensor = self.head(self.norm(x_BSD))
        return logits_BSV

    def _embed(self, ids_BS: Tensor) -> Tensor:
        """A byte's embedding sees a few bytes before it too, which a tokenizer would give."""
        shifted = [F.pad(ids_BS, (back, -back)) for back in range(len(self.embeddings))]
        parts = [embed(ids) for embed, ids in zip(self.embeddings, shifted, strict=True)]
        return torch.stack(parts).sum(0)

    def shard_experts(self, shuffle: Shuffle) -> None:
        """Keeps this rank's experts; `shuffle` brings their tokens from now on."""
        for moe in self.moe_layers():
            moe.shard_experts(shuffle)

    def moe_layers(self) -> list[MoE]:
        return [moe for moe in self.moes if isinstance(moe, MoE)]

    def expert_parameters(self) -> list[nn.Parameter]:
        return list(chain.from_iterable(moe.experts.parameters() for moe in self.moe_layers()))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, `[B, S, D]` to `[B, S, D]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = nn.RMSNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True)
        out_BSD: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out_BSD


def _rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of `[B, heads, S, head size]`."""
    size = x.shape[-1]
    frequency = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(x.shape[-2])[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class MoE(nn.Module):
    """A router and its experts, `[B, S, D]` to `[B, S, D]`."""

    routing: Routing

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.norm = nn.RMSNorm(config.hidden_size)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.expert_size) for _ in range(config.num_experts)
        )
        self.shuffle: Shuffle | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = self.norm(x_BSD).flatten(0, 1)
        self.routing = self._route(x_TD)
        if self.shuffle is None:
            y_TD = self._mix_here(x_TD, self.routing)
        else:
            y_TD = self._mix_sharded(x_TD, self.routing, self.shuffle)
        return y_TD.view_as(x_BSD)

    def shard_experts(self, shuffle: Shuffle) -> None:
        ranks = shuffle.topology.rank_of_expert
        here = (rank == shuffle.topology.rank for rank in ranks)
        self.experts = nn.ModuleList(compress(self.experts, here))
        self.shuffle = shuffle

    def _route(self, x_TD: Tensor) -> Routing:
        probabilities_TE = self.router(x_TD).softmax(-1)
        weights_TK, idx_TK = probabilities_TE.topk(self.top_k)
        return Routing(
            topk_idx=idx_TK,
            topk_weights=weights_TK / weights_TK.sum(-1, keepdim=True),
            mean_probability=probabilities_TE.mean(0),
        )

    def _mix_sharded(self, x_TD: Tensor, routing: Routing, shuffle: Shuffle) -> Tensor:
        """Rows come sorted by expert from every rank, and their weighted sums go home."""
        d = shuffle.dispatch(x_TD, routing.topk_idx, routing.topk_weights)
        groups = d.tokens.split(d.tokens_per_expert.tolist())
        outputs = [expert(rows) for expert, rows in zip(self.experts, groups, strict=True)]
        return shuffle.combine(torch.cat(outputs), d)

    def _mix_here(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The textbook loop: each expert looks for its tokens and adds to their sums."""
        y_TD = torch.zeros_like(x_TD)
        for expert_idx, expert in enumerate(self.experts):
            token, k = torch.where(routing.topk_idx == expert_idx)
            y_TD.index_add_(0, token, expert(x_TD[token]) * routing.topk_weights[token, k, None])
        return y_TD


class Expert(nn.Module):
    """A feed-forward network of two layers, on any number of rows."""

    def __init__(self, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.into = nn.Linear(hidden_size, expert_size, bias=False)
        self.out = nn.Linear(expert_size, hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.out(F.gelu(self.into(rows)))
        return outputs
