"""Launch commands for torchrun and accelerate, as lists of words (never joined into a shell line).

    torchrun_command(spec, python="python", log_dir="runs/x/logs/attempt-001")
    accelerate_config(spec)  accelerate_command(spec, config_file, script)

One node uses torchrun's --standalone; several use the static rendezvous, where each node is given its rank: with c10d, two
agents could hang when a rank was killed, and on a shared loopback accelerate failed its port check. For the same reason
--max-restarts=0: launcher/supervise restarts the whole group.
"""

from __future__ import annotations

from typing import Any

from .job import JobSpec

TRAINER = "chatmill.trainer.train"


def torchrun_command(
    spec: JobSpec,
    *,
    python: str,
    log_dir: str,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 29500,
) -> list[str]:
    """Words that start this node's processes; each rank's output goes to log_dir, local rank 0's to the terminal too."""
    command = [python, "-m", "torch.distributed.run", f"--nproc-per-node={spec.processes}", "--max-restarts=0"]
    if spec.nodes == 1:
        command.append("--standalone")
    else:
        command += [
            f"--nnodes={spec.nodes}",
            f"--node-rank={node_rank}",
            "--rdzv-backend=static",
            f"--master-addr={master_addr}",
            f"--master-port={master_port}",
        ]
    command += [f"--log-dir={log_dir}/node-{node_rank}", "--redirects=3", "--tee=3", "--local-ranks-filter=0"]
    return [*command, "-m", TRAINER, *spec.arguments]


def single_command(spec: JobSpec, *, python: str) -> list[str]:
    """Words that train in one process."""
    return [python, "-m", TRAINER, *spec.arguments]


def accelerate_config(spec: JobSpec, *, master_addr: str = "127.0.0.1", master_port: int = 29500) -> dict[str, Any]:
    """An accelerate config file's contents.

    The recipe decides precision and engine, so accelerate is told neither a precision nor an FSDP or DeepSpeed plugin.
    Without GPUs accelerate starts one process whatever num_processes says; trainer/train.py turns that into a torchrun.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if spec.gpus_per_node and spec.world_size > 1 else "NO",
        "use_cpu": spec.gpus_per_node == 0,
        "num_machines": spec.nodes,
        "num_processes": spec.world_size,
        "machine_rank": 0,
        "main_process_ip": master_addr,
        "main_process_port": master_port,
        "rdzv_backend": "static",
        "same_network": True,
        "dynamo_config": {},
        "main_training_function": "main",
        "debug": False,
    }


def accelerate_command(
    spec: JobSpec, *, accelerate: str, config_file: str, script: str = "trainer/train.py", node_rank: int = 0
) -> list[str]:
    """Words for one node. Raises ValueError for several nodes without GPUs, which accelerate cannot start."""
    if spec.nodes > 1 and spec.gpus_per_node == 0:
        raise ValueError("accelerate starts one process per node without GPUs; use torchrun for several CPU nodes")
    command = [accelerate, "launch", "--config_file", config_file]
    if spec.nodes > 1:
        command += ["--machine_rank", str(node_rank)]
    return [*command, script, *spec.arguments]
