"""DDP's buckets in their final order before the first step, so that a resumed run rounds as the uninterrupted one does.

DDP reduces the first backward pass in one bucket in the order of registration, and every later one in buckets of 1 and 25 MB in
the order in which gradients became ready. Where more than two ranks are summed, a value's place in its bucket decides in which
order the ranks are added: the first step after a resume would differ in the last bit, and the run from there on.
One backward pass over a few tokens before the first step lets DDP see that order; its gradients are thrown away. With
train.compile it is left out: a resumed run on more than two ranks then goes on to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

TOKENS, ROWS = 16, 128


def settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Run one small forward and backward pass; call it where gradients are computed in (under the same autocast)."""
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
