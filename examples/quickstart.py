"""The README's example: torchrun --nproc-per-node 4 examples/quickstart.py"""

import torch
import torch.distributed as dist

import fusco

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
with fusco.Shuffle(num_experts=32, hidden_size=256, top_k=4, max_tokens=1024) as shuffle:
    experts = torch.randn(32 // dist.get_world_size(), 256, 256, dtype=torch.bfloat16) / 16
    x = torch.randn(1024, 256, dtype=torch.bfloat16)
    weights, topk_idx = torch.randn(1024, 32).softmax(dim=-1).topk(4)
    d = shuffle.dispatch(x, topk_idx, weights)  # d.tokens: this rank's rows, sorted by expert
    rows = d.tokens.split(d.tokens_per_expert.tolist())
    y = shuffle.combine(torch.cat([*map(torch.matmul, rows, experts)]), d)  # [1024, 256]
    print(f"rank {dist.get_rank()}: {len(d.tokens)} rows, {shuffle.engine_name} engine")
dist.destroy_process_group()
