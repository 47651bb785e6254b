"""The sharded model is the model: the same losses, and the same gradients before any optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusco.api import Shuffle
from fusco.demo import ranks
from fusco.demo.data import Corpus
from fusco.demo.model import ModelConfig, build_model
from fusco.demo.train import TrainConfig, Trainer
from fusco.errors import InputError
from fusco.testing.ranks import RankPool

CONFIG = TrainConfig(
    num_steps=6,
    eval_every=3,
    num_warmup_steps=2,
    num_sequences=8,
    num_held_out_sequences=8,
    model=ModelConfig(
        hidden_size=16, num_heads=2, sequence_length=16, num_experts=16, expert_size=8
    ),
)


def make_corpus() -> Corpus:
    text = torch.randint(256, (2, 5000), generator=torch.Generator().manual_seed(1))
    train, held_out = text.to(torch.uint8)
    return Corpus(train=train, held_out=held_out, num_files=2)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    trainer.backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def gradients_of_rank(rank: int) -> dict[str, Tensor]:
    with Shuffle(
        num_experts=16, hidden_size=16, top_k=4, max_tokens=16, dtype=torch.float32
    ) as shuffle:
        return gradients(Trainer(CONFIG, make_corpus(), shuffle))


def losses_of_rank(rank: int) -> list[tuple[float, float | None]]:
    with Shuffle(
        num_experts=16, hidden_size=16, top_k=4, max_tokens=16, dtype=torch.float32
    ) as shuffle:
        return losses(Trainer(CONFIG, make_corpus(), shuffle))


def losses(trainer: Trainer) -> list[tuple[float, float | None]]:
    records = [trainer.advance() for _ in range(CONFIG.num_steps)]
    return [(record.loss, record.held_out_loss) for record in records]


def test_gradients_of_the_ranks_are_those_of_one_process(pool: RankPool) -> None:
    """An optimizer that divides by their size would hide a factor in them."""
    alone = gradients(Trainer(CONFIG, make_corpus()))
    for rank, sharded in enumerate(pool.run(gradients_of_rank)):
        for name, gradient in sharded.items():
            parts = name.split(".")
            if "experts" in parts:
                local = parts.index("experts") + 1
                parts[local] = str(int(parts[local]) + 2 * rank)
            expected = alone[".".join(parts)]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_losses_of_the_ranks_are_those_of_one_process(pool: RankPool) -> None:
    alone = losses(Trainer(CONFIG, make_corpus()))
    assert [held_out is None for _, held_out in alone] == [True, True, False, True, True, False]
    for sharded in pool.run(losses_of_rank):
        for (a, held_out_a), (b, held_out_b) in zip(alone, sharded, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
            assert held_out_a == pytest.approx(held_out_b, abs=1e-5)


def test_routing_and_text_of_the_ranks(pool: RankPool) -> None:
    config = TrainConfig(num_steps=1, model=CONFIG.model)
    pool.run(ranks.begin, config)
    routings = pool.run(ranks.record_routing)
    texts = pool.run(ranks.write_text, b"def ", 20)
    pool.run(ranks.end)
    for routing in routings:
        assert routing.topk_idx.shape == routing.topk_weights.shape == (2, 32 * 16 // 8, 4)
        assert 0 <= routing.topk_idx.min() <= routing.topk_idx.max() < 16
        torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(2, 32 * 16 // 8))
    assert all(text.startswith(b"def ") and len(text) == 24 for text in texts)


def test_the_mixture_is_the_weighted_sum_of_the_chosen_experts() -> None:
    moe = build_model(CONFIG.model, seed=0).moe_layers()[0]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    y = moe(x).flatten(0, 1)
    normed = moe.norm(x).flatten(0, 1)
    for token in range(6):
        chosen = zip(moe.routing.topk_idx[token], moe.routing.topk_weights[token], strict=True)
        expected = sum(weight * moe.experts[int(e)](normed[token]) for e, weight in chosen)
        torch.testing.assert_close(y[token], expected)


def test_no_byte_sees_a_later_one() -> None:
    model = build_model(CONFIG.model, seed=0)
    ids = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


@pytest.mark.parametrize("num_ranks", [1, 3, 32])
def test_ranks_that_cannot_share_the_model_are_refused(num_ranks: int) -> None:
    with pytest.raises(InputError, match=rf"num_ranks.*got {num_ranks}.*2, 4, 8, 16"):
        TrainConfig().check(num_ranks)
