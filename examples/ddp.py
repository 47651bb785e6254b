"""The layer of moe_layer.py with DistributedDataParallel, which keeps what is replicated alike.

torchrun --nproc-per-node 4 examples/ddp.py
"""

import torch

# Optimizers import it; see moe_layer.py.
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from moe_layer import HIDDEN, TOKENS, MoELayer, open_shuffle, report
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with open_shuffle() as shuffle:
        # Experts differ; of all else DDP sends rank 0's values to the others.
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), MoELayer(shuffle))
        experts = [name for name, _ in model.named_parameters() if ".experts." in name]
        # Each rank has other experts, of which nothing is to be averaged.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
        replicas = DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        teacher = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) / 4
        for step in range(40):
            x = torch.randn(TOKENS, HIDDEN)
            loss = F.mse_loss(replicas(x), (x @ teacher).relu())
            optimizer.zero_grad()
            loss.backward()
            # DDP averages gradients over ranks; those of experts are sums over all ranks' tokens.
            for name in experts:
                model.get_parameter(name).grad.div_(num_ranks)
            optimizer.step()
            report(step, loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
