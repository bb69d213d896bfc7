"""`chatmill plan`: its counts against the meta model, its memory against what the allocator really handed out."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from chatmill.config import ConfigError
from chatmill.data.stream import PackedBatch
from chatmill.launcher.__main__ import main
from chatmill.trainer.adapters.prepare import prepare
from chatmill.trainer.checkpoint.sharding import local_of
from chatmill.trainer.config import ModelConfig, Recipe, load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.choose import build_engine
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.plan.hardware import GIB, find_gpu, known_gpu
from chatmill.trainer.plan.memory import Estimator
from chatmill.trainer.plan.memory_trace import estimate_step, trace_step
from chatmill.trainer.plan.plan import make_plan, show

SHAPE = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, layers=6, heads=4, kv_heads=2, context=1024, tied_embeddings=False
)
RECIPES = ("tiny", "demo-gpu", "360m", "1b", "8b", "8b-qlora")


def recipe(engine: str = "single", **train: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": SHAPE.model_dump(),
            "data": {"sequence_length": 512},
            "train": {"precision": "fp32", **train},
            "parallel": {"strategy": engine},
        }
    )


def batch(tokens: int) -> PackedBatch:
    """One pack of one document, every token supervised."""
    ramp = torch.arange(tokens, dtype=torch.int32)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    counts = dict.fromkeys(("loss_tokens", "n_tokens", "step_loss_tokens", "step_tokens"), tokens)
    zeros = torch.zeros(tokens, dtype=torch.int32)
    return PackedBatch(zeros, zeros.long(), ramp, ends, ramp, tokens, **counts, uids=("one",))


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had handed out at once since the call began."""
    gc.collect()  # what earlier tests left behind would be freed in the middle and counted against this run
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler
    assert results is not None
    events = sorted((e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert events
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Rank 0 of so many processes whose collectives do nothing: all memory of a rank, and no thread that frees some unseen."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    try:
        yield World(0, request.param, 0, request.param, torch.device("cpu"), "fake")
    finally:
        dist.destroy_process_group()


def unreduced(state, bucket):  # DDP compares annotations with classes, and here they are strings
    """The bucket as it is: the fake backend has no result that DDP could wait for."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.mark.parametrize("name", RECIPES)
def test_counted_parameters_are_those_of_the_model_on_the_meta_device(name: str) -> None:
    config = load_recipe(name).model.shape()
    with torch.device("meta"):
        model = Decoder(config)
    assert config.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_activations_are_what_a_step_allocates(precision, checkpointing: bool) -> None:
    tokens = 1024
    predicted = trace_step(SHAPE, tokens=tokens, rows=tokens, precision=precision, device="cpu", checkpointing=checkpointing)
    model = Decoder(SHAPE)
    model.init_weights(0)
    model.set_recompute(checkpointing)
    given = batch(tokens)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model(given.tokens, given.positions, given.cu_seqlens, targets=given.targets, rows=given.rows)
        output.loss_sum.backward()

    step()  # gradients exist from here on, the peak is that of the activations
    found = measured_peak(step)
    assert predicted.total == pytest.approx(found, rel=0.02 if precision == "fp32" else 0.07)  # bf16: oneDNN's own buffers
    assert predicted.activations > 4 * tokens * SHAPE.hidden_size


@pytest.mark.parametrize(
    ("engine", "world", "accumulation", "packs"),
    [
        ("single", 1, 1, 1),
        ("single", 1, 2, 2),
        ("ddp", 4, 1, 2),
        ("ddp", 4, 2, 1),
        ("fsdp2", 2, 1, 1),
        ("fsdp2", 4, 1, 2),
        ("fsdp2", 4, 2, 2),
    ],
    indirect=["world"],
)
def test_a_whole_step_needs_what_the_plan_says(
    engine: str, world: World, accumulation: int, packs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "chatmill.trainer.engine.torch_engine.settle_buckets", lambda *given: None
    )  # before the hook below could be set
    given = recipe(engine, micro_batch=packs, accumulation=accumulation)
    predicted = Estimator(given, SHAPE, device="cpu").memory(engine, world.world_size)

    def run() -> None:
        model = Decoder(SHAPE, given.kernels)
        model.init_weights(0)
        made = build_engine(given, model, world)
        if isinstance(made.model, DistributedDataParallel):
            made.model.register_comm_hook(None, unreduced)
        for _ in range(2):
            made.forward_backward([batch(512 * packs)] * accumulation)
            for parameter in made.decoder.parameters():
                parameter.grad.fill_(1e-3)  # nothing was reduced
            made.step(1e-3)

    assert predicted.tensors == pytest.approx(measured_peak(run), rel=0.05)


@pytest.mark.parametrize(
    ("engine", "world", "precision"),
    [("single", 1, "bf16"), ("fsdp2", 2, "nf4"), ("single", 1, "int8")],
    indirect=["world"],
)
def test_a_step_of_an_adapter_needs_what_the_plan_says(engine: str, world: World, precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    shape = SHAPE.model_dump() | {"checkpoint": "base", "base_precision": precision}
    given = Recipe.model_validate(recipe(engine, micro_batch=2).model_dump() | {"model": shape, "adapter": {"rank": 8}})
    estimator = Estimator(given, SHAPE, device="cpu")
    predicted = estimator.memory(engine, world.world_size)
    assert predicted.weights < 0.6 * 4 * SHAPE.parameter_counts()["total"] / world.world_size

    def run() -> None:
        model = Decoder(SHAPE, given.kernels)
        prepare(model, given)
        made = build_engine(given, model, world)
        for parameter in made.decoder.parameters():
            local = local_of(parameter.detach())
            local.zero_() if parameter.requires_grad or not local.is_floating_point() else local.fill_(0.01)
        for _ in range(2):
            made.forward_backward([batch(1024)])
            for parameter in made.decoder.parameters():
                if parameter.requires_grad:
                    parameter.grad.fill_(1e-3)
            made.step(1e-3)

    assert predicted.tensors == pytest.approx(measured_peak(run), rel=0.08)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"low_precision_weights": True}])
def test_a_deep_model_is_estimated_exactly_from_shallow_ones(options: dict) -> None:
    deep = ModelConfig.model_validate(SHAPE.model_dump() | {"layers": 9})
    whole = trace_step(deep, tokens=1024, rows=1024, precision="bf16", **options)
    assert estimate_step(deep, tokens=1024, rows=1024, precision="bf16", **options) == whole


def test_checkpointing_and_fewer_loss_rows_save_memory() -> None:
    def total(**options) -> int:
        return trace_step(SHAPE, **{"tokens": 4096, "rows": 4096, "precision": "bf16"} | options).total

    assert total(checkpointing=True) < 0.6 * total()
    assert total(rows=1024) < total()


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    estimator = Estimator(recipe(), SHAPE)
    limit = GIB
    packs = estimator.largest_micro_batch("single", 1, limit)
    assert packs > 4
    exact = Estimator(recipe(micro_batch=packs), SHAPE)
    assert exact.memory("single", 1).total <= 1.01 * limit  # traced, not extrapolated
    assert Estimator(recipe(micro_batch=packs + 1), SHAPE).memory("single", 1).total > 0.99 * limit
    assert estimator.memory("single", 1, packs).total <= limit < estimator.memory("single", 1, packs + 1).total


def test_sharding_divides_what_it_says() -> None:
    estimator = Estimator(recipe(precision="bf16"), SHAPE)
    n = SHAPE.parameter_counts()["total"]
    for engine in ("fsdp2", "zero3"):
        two, four = estimator.memory(engine, 2), estimator.memory(engine, 4)
        assert four.optimizer == pytest.approx(two.optimizer / 2, rel=1e-3)
        assert four.weights == pytest.approx(two.weights / 2, rel=1e-3)
    assert estimator.memory("ddp", 8).optimizer == 8 * n
    assert estimator.memory("zero1", 4).weights == 2 * n


def test_the_recommended_engine_changes_with_the_size_of_the_model() -> None:
    gpu = find_gpu("h100")
    small, large = load_recipe("360m"), load_recipe("8b")
    assert make_plan(small, small.model.shape(), gpu, 8, engines=["ddp", "fsdp2"], world_sizes=[8]).engine == "ddp"
    plan = make_plan(large, large.model.shape(), gpu, 16, engines=["ddp", "fsdp2"], world_sizes=[16])
    assert plan.engine == "fsdp2"
    assert any("ddp does not fit" in reason for reason in plan.reasons) and "does not fit" in show(plan)
    alone = make_plan(large, large.model.shape(), find_gpu("4090"), 1, engines=["single"])
    assert alone.engine is None
    assert alone.reasons[-1].startswith("try ")


def test_a_layer_that_is_recomputed_lies_beside_the_gradients_of_all_others() -> None:
    wide = SHAPE.model_copy(update={"intermediate_size": 8192, "layers": 4})
    estimator = Estimator(recipe(activation_checkpointing=True, micro_batch=4), wide, device="cpu")
    activations, workspace, last = estimator.activations(False, 4)
    memory = estimator.memory("single", 1)
    total = wide.parameter_counts()["total"]
    gradients = 4 * (total - estimator.parts.layer.trained - wide.vocab_size * wide.hidden_size)
    assert last > 4 * 4 * 512 * 8192  # at least gate and up, in fp32 and beside their gradients
    assert memory.tensors == memory.weights + memory.optimizer + gradients + last
    assert last + gradients > max(activations + workspace, 4 * total)


@pytest.mark.parametrize("layers", [2, 5])
def test_memory_of_a_model_that_recomputes_some_layers_lies_between(layers: int) -> None:
    def traced(**train: object) -> int:
        return Estimator(recipe(micro_batch=2, **train), SHAPE, device="cpu").activations(False, 2)[0]

    none, all_layers = traced(), traced(activation_checkpointing=True)
    some = traced(activation_checkpointing=True, activation_checkpointing_layers=layers)
    assert all_layers < some < none

    model = Decoder(SHAPE)
    model.set_recompute(True, layers)
    assert model.recompute == f"full ({layers} of 6 layers)"
    model.init_weights(0)
    kept, made = 0, batch(512)

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    def saved(recompute: bool, first: int | None) -> int:
        nonlocal kept
        kept = 0
        model.set_recompute(recompute, first)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(made.tokens, made.positions, made.cu_seqlens, targets=made.targets, rows=made.rows)
        return kept

    whole, mixed, none_kept = saved(False, None), saved(True, layers), saved(True, None)
    assert (whole - mixed) == pytest.approx((whole - none_kept) * layers / 6, rel=1e-3)
    assert (none - some) == pytest.approx((none - all_layers) * layers / 6, rel=1e-3)


def test_time_follows_from_flops_peak_and_the_stated_mfu() -> None:
    given = recipe(steps=100, micro_batch=4, precision="bf16")
    work = make_plan(given, SHAPE, find_gpu("h100"), 2, mfu=0.5, engines=["ddp"], context=300.0).work
    matrices = 6 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384) + 2048 * 128
    flops = 6 * matrices + 6 * 6 * 128 * 300.0
    assert work.flops_per_token == flops
    assert work.tokens == 100 * 2 * 4 * 512
    assert work.gpu_hours == pytest.approx(work.tokens * flops / (989.4e12 * 0.5) / 3600)
    slower = given.model_copy(update={"train": given.train.model_copy(update={"activation_checkpointing": True})})
    recomputed = make_plan(slower, SHAPE, find_gpu("h100"), 2, mfu=0.5, engines=["ddp"], context=300.0).work
    assert recomputed.hours == pytest.approx(work.hours / 0.75)
    half = slower.model_copy(update={"train": slower.train.model_copy(update={"activation_checkpointing_layers": 3})})
    partly = make_plan(half, SHAPE, find_gpu("h100"), 2, mfu=0.5, engines=["ddp"], context=300.0)
    assert SHAPE.layers == 6 and partly.work.hours == pytest.approx((work.hours + recomputed.hours) / 2)
    with pytest.raises(ConfigError, match="mfu"):
        make_plan(given, SHAPE, find_gpu("h100"), 2, mfu=40, engines=["ddp"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H200 MIG 3g.71gb", None),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("rtx4090", "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_found_by_short_and_by_driver_names(name: str, found: str | None) -> None:
    gpu = known_gpu(name)
    assert (gpu.name if gpu else None) == found


def test_the_command_prints_json_and_reads_the_data(write_recipe, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe("planned"))
    assert main(["plan", file, "--gpu", "l40s", "--gpus", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {(fit["engine"], fit["world_size"]) for fit in plan["fits"]} >= {("single", 1), ("ddp", 2), ("zero3", 2)}
    assert 0.2 < plan["loss_share"] < 0.8  # from the shards
    assert plan["work"]["context"] < 128
    assert plan["fits"][0]["memory"]["total"] == sum(v for k, v in plan["fits"][0]["memory"].items() if k != "total")
    assert main(["plan", file, "--gpu", "abacus"]) == 2
    assert "known are" in capsys.readouterr().err


def test_no_plan_is_made_for_a_model_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a run called demo where the tests were started would tell the shape
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "llama", "hidden_size": 8}', encoding="utf-8")
    for folder, told in (("nowhere", "the model's size is not known"), ("hf", "no manifest.json")):
        assert main(["plan", "demo", f"model.checkpoint={tmp_path / folder}"]) == 2
        error = capsys.readouterr().err
        assert told in error and "chatmill import" in error and "unknown key" not in error
    assert main(["plan", "demo", f"model.checkpoint={tmp_path / 'nowhere'}", "model.layers=2"]) == 0
    assert "the shape written in the recipe is used" in capsys.readouterr().out


def test_a_dry_run_prints_parameters_recipe_and_plan(
    write_recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_recipe("dry"))
    command = ["launch", file, "--on", "torchrun", "--processes-per-node", "2", "--dry-run", "--full"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "parameters  " in out and "sequence_length: 128" in out and "torch.distributed.run" in out
    assert "\nddp         2" in out and "GPU-hours" in out
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else there(name, *rest))
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "torch is not installed here" in out and "GPU-hours" not in out


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_gpu_needs_what_the_plan_says(checkpointing: bool) -> None:
    large = {"hidden_size": 1024, "intermediate_size": 4096, "layers": 12, "heads": 16, "kv_heads": 4, "vocab_size": 32768}
    shape = ModelConfig.model_validate(SHAPE.model_dump() | large | {"context": 4096})
    train = {"precision": "bf16", "micro_batch": 2, "activation_checkpointing": checkpointing}
    given = Recipe.model_validate({"model": shape.model_dump(), "data": {"sequence_length": 4096}, "train": train})
    predicted = Estimator(given, shape).memory("single", 1).tensors
    device = torch.device("cuda", 0)
    torch.cuda.init()  # the statistics exist from then on
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model = Decoder(shape, given.kernels)
    model.set_recompute(checkpointing)
    model.init_weights(0)
    made = build_engine(given, model, World(0, 1, 0, 1, device, "none"))
    for _ in range(2):
        made.forward_backward([batch(8192)])
        made.step(1e-3)
    found = torch.cuda.max_memory_allocated(device) - before
    print(f"plan {predicted / GIB:.2f} GiB, measured {found / GIB:.2f} GiB")
    assert predicted == pytest.approx(found, rel=0.1)
