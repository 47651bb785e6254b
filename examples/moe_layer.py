"""An MoE layer with its experts spread over the ranks, trained for a few steps.

torchrun --nproc-per-node 4 examples/moe_layer.py
"""

import torch

# Optimizers import it. After init_process_group it would keep the group, whose threads may then end
# the process while Python ends.
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fusco

NUM_EXPERTS, HIDDEN, TOP_K, TOKENS = 16, 64, 2, 512


class MoELayer(nn.Module):
    """`[T, H]` to `[T, H]`; the router is the same on all ranks, the experts are this rank's."""

    def __init__(self, shuffle: fusco.Shuffle) -> None:
        super().__init__()
        self.shuffle = shuffle
        num_local = shuffle.topology.num_local_experts[shuffle.topology.rank]
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(num_local))

    def forward(self, x: Tensor) -> Tensor:
        weights, topk_idx = self.router(x).softmax(dim=-1).topk(TOP_K)
        d = self.shuffle.dispatch(x, topk_idx, weights)
        groups = d.tokens.split(d.tokens_per_expert.tolist())  # by local expert
        outputs = [expert(rows) for expert, rows in zip(self.experts, groups, strict=True)]
        return self.shuffle.combine(torch.cat(outputs), d)


def open_shuffle() -> fusco.Shuffle:
    return fusco.Shuffle(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        max_tokens=TOKENS,
        dtype=torch.float32,
    )


def report(step: int, loss: Tensor) -> None:
    mean = loss.detach()
    dist.all_reduce(mean)
    if dist.get_rank() == 0 and step % 13 == 0:
        print(f"step {step:2d}  loss {mean.item() / dist.get_world_size():.3f}")


def main() -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with open_shuffle() as shuffle:
        torch.manual_seed(0)  # what is replicated must begin the same
        layer = MoELayer(shuffle)
        teacher = torch.randn(HIDDEN, HIDDEN) / 4
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
        torch.manual_seed(rank)  # every rank has tokens of its own
        for step in range(40):
            x = torch.randn(TOKENS, HIDDEN)
            loss = F.mse_loss(layer(x), (x @ teacher).relu())
            optimizer.zero_grad()
            # The loss of the job is the mean over ranks. An expert's gradient has the tokens of
            # all of them in it already; the router's is summed here.
            (loss / num_ranks).backward()
            dist.all_reduce(layer.router.weight.grad)
            optimizer.step()
            report(step, loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
