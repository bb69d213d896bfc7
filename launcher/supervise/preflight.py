"""One all-reduce over all ranks before training: is the network up, are the sums right, how fast is it?

    torchrun ... -m chatmill.launcher.supervise.preflight

Started by slurm/train.sh on several GPU nodes (CHATMILL_PREFLIGHT=1 or 0 forces it on or off). A wrong network interface
shows at NCCL's first collective: here it fails within two minutes, not after the model was loaded.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main(megabytes: int = 64, repeats: int = 5, timeout_s: float = 120.0) -> int:
    """All-reduce `megabytes` of fp32 a few times; rank 0 prints the bandwidth. Returns 1 if a sum is wrong."""
    use_cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    tensor = torch.empty(megabytes << 18, device=device)
    seconds = []
    for _ in range(repeats):
        tensor.fill_(float(rank + 1))
        began = time.monotonic()
        dist.all_reduce(tensor)
        if use_cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    expected = world_size * (world_size + 1) / 2
    wrong = int((tensor != expected).sum())
    if wrong:
        print(f"preflight: rank {rank} on {hosts[rank]}: {wrong} elements of an all-reduce are wrong", file=sys.stderr)
    if rank == 0:
        moved = 2 * (world_size - 1) / world_size * tensor.nbytes  # bytes that each rank of a ring sends
        print(
            f"preflight: {world_size} ranks on {len(set(hosts))} hosts, {'nccl' if use_cuda else 'gloo'}, "
            f"all-reduce of {megabytes} MiB correct, bus {moved / min(seconds) / 1e9:.2f} GB/s, first took {seconds[0]:.2f} s",
            flush=True,
        )
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
