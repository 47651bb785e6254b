"""Segments of any size between ranks: a matrix held by rows becomes one held by columns.

Every rank has a block of rows and wants a block of columns. Each row is cut where the columns'
owners change, and every piece goes straight to its place: nothing is packed or unpacked.

torchrun --nproc-per-node 4 examples/exchange.py
"""

from itertools import pairwise

import torch
import torch.distributed as dist

import fusco

NUM_ROWS, NUM_COLUMNS = 1000, 777


def bounds(length: int, num_ranks: int) -> list[int]:
    """Where each rank's share begins, and the end; shares differ by one at most."""
    return [length * rank // num_ranks for rank in range(num_ranks + 1)]


def pieces(starts: torch.Tensor, num_elements: int) -> fusco.Segments:
    """Segments of so many elements of 4 bytes, from these elements on."""
    return fusco.Segments(offset=4 * starts, size=torch.full_like(starts, 4 * num_elements))


def main() -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    row, column = bounds(NUM_ROWS, num_ranks), bounds(NUM_COLUMNS, num_ranks)
    matrix = torch.arange(NUM_ROWS * NUM_COLUMNS, dtype=torch.float32).view(NUM_ROWS, NUM_COLUMNS)

    by_rows = matrix[row[rank] : row[rank + 1]].contiguous()
    by_columns = torch.empty(NUM_ROWS, column[rank + 1] - column[rank])
    width = by_columns.shape[1]
    send = [
        pieces(torch.arange(len(by_rows)) * NUM_COLUMNS + begin, end - begin)
        for begin, end in pairwise(column)
    ]
    receive = [pieces(torch.arange(begin, end) * width, width) for begin, end in pairwise(row)]
    fusco.exchange(by_rows, send, by_columns, receive)

    torch.testing.assert_close(by_columns, matrix[:, column[rank] : column[rank + 1]])
    print(f"rank {rank}: {list(by_rows.shape)} by rows is {list(by_columns.shape)} by columns now")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
