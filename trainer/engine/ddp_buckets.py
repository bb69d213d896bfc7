"""Put DDP's buckets into their final order before the first step, so that a resumed run rounds as an uninterrupted one.

DDP reduces the first backward pass in one bucket in the order of registration, and every later one in buckets of 1 and 25 MB in
the order in which gradients became ready. With more than two ranks, a value's place in its bucket decides in which order the
ranks are added: the first step after a resume would differ in the last bit, and so would the rest of the run.
One backward pass over a few tokens before the first step shows DDP that order; its gradients are thrown away. It is left out
with train.compile: on more than two ranks a resumed run then equals the uninterrupted one only up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

TOKENS, ROWS = 16, 128


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Run one small forward and backward pass. Call it under the autocast that training uses."""
    ramp = torch.arange(TOKENS, dtype=torch.int32, device=device)
    rows = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
    rows[:TOKENS] = ramp
    ends = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    zeros = torch.zeros(TOKENS, dtype=torch.int32, device=device)
    output = model(zeros, ramp, ends, targets=zeros.long(), rows=rows, max_seqlen=TOKENS)
    loss: Tensor = output.loss_sum
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
