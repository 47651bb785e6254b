"""One routing decision, several transfers: fp8 rows with their scales go in, bf16 comes out.

torchrun --nproc-per-node 4 examples/plan_reuse.py
"""

import torch
import torch.distributed as dist
from torch import Tensor

import fusco

NUM_EXPERTS, HIDDEN, TOP_K, TOKENS = 32, 512, 4, 256


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, H]` to fp8 rows `[T, H]` and the fp32 scale of each, `[T, 1]`."""
    scales = x.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scales).to(torch.float8_e4m3fn), scales


def dequantize(rows: Tensor, scales: Tensor) -> Tensor:
    return (rows.float() * scales).to(torch.bfloat16)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    with fusco.Shuffle(
        num_experts=NUM_EXPERTS, hidden_size=HIDDEN, top_k=TOP_K, max_tokens=TOKENS
    ) as shuffle:
        weights, topk_idx = torch.randn(TOKENS, NUM_EXPERTS).softmax(dim=-1).topk(TOP_K)
        weights /= weights.sum(dim=1, keepdim=True)

        # A tuple moves as one: each row lands beside its scale.
        x = torch.randn(TOKENS, HIDDEN)
        d = shuffle.dispatch(quantize(x), topk_idx, weights)
        # Experts that change nothing, so that x must come back: the weights of a token sum to 1.
        y = shuffle.combine(dequantize(*d.tokens), d)
        print(f"rank {rank}: fp8 in, {y.dtype} out, worst error {(y - x).abs().max():.2f}")

        # The same tokens again, in another form: the plan is there, and the weights may be new.
        equal = torch.full_like(weights, 1 / TOP_K)
        again = shuffle.dispatch(x.to(torch.bfloat16), topk_weights=equal, plan=d.plan)
        y = shuffle.combine(again.tokens, again)
        print(f"rank {rank}: plan reused, worst error {(y - x).abs().max():.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
