"""DeepSpeed's configuration for a recipe, and what must be set before its engine is made. Tested with DeepSpeed 0.19.8."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatmill.config import ConfigError

from ..config import Recipe

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default


def zero_config(recipe: Recipe, stage: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe and a model with this many elements.

    DeepSpeed allocates the whole bucket in which it collects gradients, 2 GB of fp32 by default, however small the model is.
    (Its bucket for gathering weights is only an upper limit.)
    """
    bf16 = recipe.train.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch,
        "gradient_accumulation_steps": recipe.train.accumulation,
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": False,
            "reduce_bucket_size": min(elements, LARGEST_BUCKET),
        },
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, or Muon, as in the other engine
        "communication_data_type": "fp32",
        "steps_per_print": 1 << 30,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.optimizer.clip_norm is not None:
        config["gradient_clipping"] = recipe.optimizer.clip_norm
    parallel = recipe.parallel
    if parallel.offload != "none":
        place: dict[str, Any] = {"device": parallel.offload, "pin_memory": torch.cuda.is_available()}
        if parallel.nvme_path is not None:
            place["nvme_path"] = parallel.nvme_path
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW steps on the CPU; DeepSpeed's own compiles C++
        config["zero_optimization"]["offload_optimizer"] = place
        if stage == 3:
            config["zero_optimization"]["offload_param"] = dict(place)
    return config


def import_deepspeed() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "parallel.strategy=zero* needs DeepSpeed, which is not installed.\n"
            "Install it with: DS_BUILD_OPS=0 pip install --no-build-isolation 'chatmill[gpu]', or use parallel.strategy=fsdp2."
        ) from error
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 calls deprecated, which fills a log with one warning per call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++ for a minute at the first start on a CPU
    return deepspeed


@contextlib.contextmanager
def swapping_as_computed(deepspeed: Any, recipe: Recipe) -> Iterator[None]:
    """Keep fp32 weights on disk as fp32 where the device has no fp16, such as a CPU.

    DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py:409) reads `dtype or fp16 if fp16_supported else bf16` and
    then rounds them to bf16, whatever dtype was given: losses were off by 2e-5 before the first update.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    if recipe.parallel.offload != "nvme" or recipe.train.precision == "bf16" or accelerator.is_fp16_supported():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def check_nvme(folder: Path) -> None:
    """Refuse NVMe offload without libaio or a folder to write to. Raises ConfigError."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload=nvme needs DeepSpeed's async_io, which needs libaio with its headers and a C++ compiler.\n"
            "Install it (Debian: libaio-dev), or use parallel.offload=cpu."
        )
    if not folder.is_dir():
        raise ConfigError(
            f"parallel.nvme_path={folder} is not a folder on this machine: create it on a local disk of every node"
        )
