"""An MoE layer on GPUs: grouped products, overlap with a shared expert, and all of it in a graph.

torchrun --nproc-per-node 2 examples/gpu_layer.py

Needs a GPU a rank that reach each other, PyTorch 2.11 or later with CUDA 13, and cuda-core.
"""

import os
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fusco

NUM_EXPERTS, HIDDEN, WIDTH, TOP_K, TOKENS = 32, 1024, 2048, 4, 4096


def grouped(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """`[R, A]` by `[L, A, B]`, rows `offsets[e]:offsets[e + 1]` by matrix e, to `[R, B]`."""
    if hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(rows, matrices, offs=offsets[1:])
    return torch.cat([*map(torch.matmul, rows.split(offsets.diff().tolist()), matrices)])


class MoELayer(nn.Module):
    """`[T, H]` to `[T, H]`; router and shared expert are on all ranks, the others on one."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Parameter(torch.randn(num_local, HIDDEN, WIDTH) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(num_local, WIDTH, HIDDEN) / WIDTH**0.5)

    def experts(self, d: fusco.Dispatched[Tensor]) -> Tensor:
        inner = F.silu(grouped(d.tokens, self.up, d.expert_offsets))
        return grouped(inner, self.down, d.expert_offsets)

    def forward(self, x: Tensor, shuffle: fusco.Shuffle, overlap: bool = False) -> Tensor:
        weights, topk_idx = self.router(x).float().softmax(dim=-1).topk(TOP_K)
        if not overlap:
            d = shuffle.dispatch(x, topk_idx, weights)
            return shuffle.combine(self.experts(d), d) + self.shared(x)
        d, arrived = shuffle.dispatch(x, topk_idx, weights, async_op=True)
        shared = self.shared(x)  # while tokens are on their way
        arrived.wait()
        y, returned = shuffle.combine(self.experts(d), d, async_op=True)
        returned.wait()
        return y + shared


def main() -> None:
    local_rank, num_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if (found := torch.cuda.device_count()) < num_here:
        print(f"This example needs a GPU a rank: {num_here}, and torch finds {found}.")
        return
    torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # Grouped products want experts to begin at 16 bytes; what runs beside others leaves them room.
    shape = {"num_experts": NUM_EXPERTS, "hidden_size": HIDDEN, "top_k": TOP_K}
    make = partial(fusco.Shuffle, **shape, max_tokens=TOKENS, expert_alignment=8, num_sms=24)
    room = num_ranks * TOKENS * TOP_K + 8 * NUM_EXPERTS  # enough however tokens are routed
    with make() as shuffle, make(max_recv_tokens=room) as fixed:
        torch.manual_seed(0)  # what is on all ranks must begin the same
        layer = MoELayer(NUM_EXPERTS // num_ranks).to("cuda", torch.bfloat16)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        torch.manual_seed(1 + rank)  # every rank has tokens of its own
        x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
        for step in range(20):
            loss = F.mse_loss(layer(x, shuffle), x.roll(1, dims=1).relu())
            optimizer.zero_grad()
            (loss / num_ranks).backward()
            for everywhere in (layer.router.weight, layer.shared.weight):
                dist.all_reduce(everywhere.grad)
            optimizer.step()
            if rank == 0 and step % 19 == 0:
                print(f"step {step:2d}  loss {loss.item():.3f}")
        with torch.no_grad():
            worst = (layer(x, shuffle, overlap=True) - layer(x, shuffle)).abs().max()
            print(f"rank {rank}: overlapped, worst difference {worst:.4f}")
            layer(x, fixed)  # loads its kernels, which cannot be captured
            graph, static_x = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                static_y = layer(static_x, fixed)
            graph.replay()  # for other tokens, copy them to static_x before
            torch.cuda.synchronize()
            fixed.synchronize()  # raises what was found meanwhile
            worst = (static_y - layer(x, shuffle)).abs().max()
            print(f"rank {rank}: in a graph, worst difference {worst:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
