"""Kernel tests run compiled where there is a CUDA GPU, and in Triton's interpreter everywhere else."""

import os

import torch

if not torch.cuda.is_available():
    # before any test module imports triton: its library functions are decorated at import
    os.environ["TRITON_INTERPRET"] = "1"
