"""GPUs by name: memory and peak speed, from the vendors' data sheets. Needs no torch, so login nodes can plan.

    gpu = find_gpu("h200")              # a short name, or what torch.cuda.get_device_name says
    gpu.bf16_flops                      # dense, without sparsity, accumulating in fp32

Most data sheets of tensor-core GPUs give figures with 2:4 sparsity; these are halved here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chatmill.config import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: what CUDA reports as the device's total, a little less than the name says. bf16_flops: FLOP/s, dense.

    memory_bandwidth: bytes per second. link_bandwidth: bytes per second and direction to the other GPUs of its node, by NVLink
    (H100 PCIe and NVL, H200 NVL: between the cards of one bridge) or, where there is none, by PCIe.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    source: str


GPUS: tuple[Gpu, ...] = (
    Gpu("gh200", 95 * GIB, 989.4e12, 4e12, 450e9, "NVIDIA GH200 Grace Hopper Superchip data sheet (96 GB HBM3)"),
    Gpu("h200-nvl", 139 * GIB, 835.5e12, 4.8e12, 450e9, "NVIDIA H200 data sheet (NVL, 141 GB)"),
    Gpu("h200", 139 * GIB, 989.4e12, 4.8e12, 450e9, "NVIDIA H200 data sheet (SXM, 141 GB)"),
    Gpu("h100-pcie", 79 * GIB, 756e12, 2e12, 300e9, "NVIDIA H100 data sheet (PCIe, 80 GB)"),
    Gpu("h100-nvl", 93 * GIB, 835e12, 3.9e12, 300e9, "NVIDIA H100 data sheet (NVL, 94 GB)"),
    Gpu("h100", 79 * GIB, 989.4e12, 3.35e12, 450e9, "NVIDIA H100 data sheet (SXM, 80 GB)"),
    Gpu(
        "gb200",
        184 * GIB,
        2500e12,
        8e12,
        900e9,
        "NVIDIA GB200 NVL72 data sheet (13.4 TB and 360 PFLOP/s with sparsity of 72 GPUs)",
    ),
    Gpu("b200", 178 * GIB, 2250e12, 8e12, 900e9, "NVIDIA DGX B200 data sheet (1,440 GB and 18 PFLOP/s of 8 GPUs)"),
    Gpu("a100-40", 39 * GIB, 312e12, 1.555e12, 300e9, "NVIDIA A100 data sheet (40 GB)"),
    Gpu("a100", 79 * GIB, 312e12, 2.039e12, 300e9, "NVIDIA A100 data sheet (80 GB)"),
    Gpu("l40s", 44 * GIB, 362e12, 0.864e12, 32e9, "NVIDIA L40S data sheet (48 GB)"),
    Gpu("l40", 44 * GIB, 181e12, 0.864e12, 32e9, "NVIDIA L40 data sheet (48 GB)"),
    Gpu("l4", 22 * GIB, 121e12, 0.3e12, 32e9, "NVIDIA L4 data sheet (24 GB)"),
    Gpu("a10", 22 * GIB, 125e12, 0.6e12, 32e9, "NVIDIA A10 data sheet (24 GB)"),
    Gpu("5090", 31 * GIB, 209.5e12, 1.792e12, 64e9, "NVIDIA RTX Blackwell architecture paper (GeForce RTX 5090, 32 GB)"),
    Gpu("4090", 23 * GIB, 165.2e12, 1.008e12, 32e9, "NVIDIA Ada architecture paper (GeForce RTX 4090, 24 GB)"),
    Gpu("3090", 23 * GIB, 71e12, 0.936e12, 32e9, "NVIDIA Ampere GA102 architecture paper (GeForce RTX 3090, 24 GB)"),
    Gpu("mi300x", 191 * GIB, 1307.4e12, 5.3e12, 448e9, "AMD Instinct MI300X data sheet (192 GB)"),
)
# what drivers call the variants
DRIVER_NAMES = {
    "h100 pcie": "h100-pcie",
    "h100 nvl": "h100-nvl",
    "h200 nvl": "h200-nvl",
    "a100-sxm4-40gb": "a100-40",
    "a100-pcie-40gb": "a100-40",
}


def known_gpu(name: str) -> Gpu | None:
    """The GPU of a short name or a driver's name ("NVIDIA H100 80GB HBM3"), or None: no figure is better than a wrong one.

    An A10G is no A10 and an RTX A1000 no A100; a part of a GPU (MIG) and a laptop's have other peaks.
    """
    low = name.lower()
    for variant, short in DRIVER_NAMES.items():
        if variant in low:
            low = short
    if re.search(r"\b(mig|laptop)\b", low):
        return None
    exact = next((gpu for gpu in GPUS if gpu.name == low), None)
    # "rtx4090" is a 4090, but "gb200" is not a b200
    return exact or next((gpu for gpu in GPUS if re.search(rf"(?:\b|\brtx){gpu.name}\b", low)), None)


def find_gpu(name: str) -> Gpu:
    """Like known_gpu, but raises ConfigError with the known names."""
    gpu = known_gpu(name)
    if gpu is None:
        raise ConfigError(f"GPU {name!r} is not in the table; known are {', '.join(gpu.name for gpu in GPUS)}")
    return gpu
