"""Hostile clients beside well-behaved ones, against a server in a process of its own: what do the latter notice?

    python -m tests.trainer.chat.mixed_load                     5 rounds of 230 clients on a tiny model
    python -m tests.trainer.chat.mixed_load runs/demo           the same on a checkpoint (make load CHECKPOINT=runs/demo)

A fifth of the clients each: connections that say nothing, headers that never end, bodies of 2 MB (texts, and lists of a million
numbers), bodies that never end, and requests for 64 replies. Beside them one stream after the other is read, and /health asked.
The server has 256 descriptors. Exit code 1 where a promise of SECURITY.md is broken. Start of the memory: after ordinary
streams; its end: after the load, when no reply is in progress.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
GAP_S = 1.0  # longest gap of a stream beyond its own decoding
GROWTH = 0.10  # of the memory
EXIT_S = 10.0  # from SIGTERM to the end
LOG_BYTES = 100_000
PLACES = 8  # replies at once


@dataclass
class Figures:
    """What was measured. Seconds and bytes; memory is the resident set of the server."""

    own_gap_s: float = 0.0  # with as many well-behaved streams as there are places, and nobody else
    gap_s: float = 0.0
    own_gap_cpu_s: float = 0.0  # of the server's processor time, between two tokens of a stream
    gap_cpu_s: float = 0.0
    wait_s: float = 0.0  # for the first token
    health_s: float = 0.0
    streams: int = 0
    refused: int = 0  # 429 or 503 to a well-behaved client, which asks again
    broken: list[str] = field(default_factory=list)
    start_bytes: int = 0
    peak_bytes: int = 0
    end_bytes: int = 0
    log_bytes: int = 0
    exit_s: float = 0.0
    last_event: str = ""
    answers: Counter[str] = field(default_factory=Counter)  # to hostile clients

    def problems(self, gap_s: float = GAP_S) -> list[str]:
        """Promises that are broken; gap_s: beyond a stream's own decoding, on a machine that may be busy otherwise.

        The server's processor time in a gap does not depend on that, and has to be below GAP_S in any case.
        """
        told = {
            f"the server worked for {self.gap_cpu_s:.2f} s between two tokens of a stream (alone {self.own_gap_cpu_s:.2f} s)": (
                self.gap_cpu_s > self.own_gap_cpu_s + GAP_S
            ),
            f"a stream stood still for {self.gap_s:.2f} s (alone {self.own_gap_s:.2f} s)": self.gap_s > self.own_gap_s + gap_s,
            f"memory grew from {self.start_bytes:,} to {self.end_bytes:,} bytes": self.end_bytes
            > (1 + GROWTH) * self.start_bytes,
            f"SIGTERM took {self.exit_s:.1f} s": self.exit_s > EXIT_S,
            f"the last event of a stream was {self.last_event!r}": "shutting_down" not in self.last_event,
            f"the log has {self.log_bytes:,} bytes": self.log_bytes > LOG_BYTES,
            f"streams broke: {self.broken[:3]}": bool(self.broken),
            "no stream was read": not self.streams,
            f"hostile clients got {dict(self.answers)}": any(kind.startswith("500") for kind in self.answers),
        }
        return [text for text, is_broken in told.items() if is_broken]


class Server:
    """`chatmill serve` in a process of its own; open_files: how many it may have."""

    def __init__(self, checkpoint: Path, log: Path, open_files: int) -> None:
        self.log = log
        command = [
            sys.executable,
            "-m",
            "chatmill.launcher",
            "serve",
            str(checkpoint),
            "--port",
            "0",
            "--max-active",
            str(PLACES),
        ]
        with log.open("wb") as out:
            limit = (open_files, open_files)
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),
            )
        until = time.monotonic() + 300
        while not (found := re.search(rb"http://127.0.0.1:(\d+)/v1", log.read_bytes())):
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        try:
            self.health()
        except OSError as error:
            raise AssertionError(f"{error!r}, exit code {self.process.poll()}: {log.read_text()}") from error

    def get(self, path: str, timeout: float = 60) -> Any:
        """The JSON of a path."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            link.request("GET", path)
            return json.loads(link.getresponse().read())
        finally:
            link.close()

    def health(self) -> dict[str, Any]:
        """What /health says."""
        answer = self.get("/health")
        assert answer["status"] == "ok", answer
        return dict(answer)

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def cpu(self) -> float:
        """Seconds of processor time that it has used, in all threads."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def wait_idle(self) -> None:
        """Until no reply is in progress, and connections have had time to end."""
        until = time.monotonic() + 330
        while (load := self.health())["active"] or load["waiting"]:
            assert time.monotonic() < until, load
            time.sleep(0.2)


@dataclass
class Stream:
    """One stream that was read to its end. gaps: seconds between its events; the first is the wait for the first token.

    gaps_cpu: the server's processor time in them.
    """

    status: int
    gaps: list[float]
    gaps_cpu: list[float]
    last: str


def read_stream(server: Server, tokens: int, number: int, on_event: Callable[[], None] = lambda: None) -> Stream:
    """Ask for a reply of so many tokens and read it as it comes."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=400)
    content = f"{number}: hello there, how are you?"
    asked = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": tokens, "ignore_eos": True}
    start, gaps, last = time.monotonic(), list[float](), ""
    start_cpu, gaps_cpu = server.cpu(), list[float]()
    try:
        link.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = link.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: {"):
                last = line.decode()
                if answer.status == 200 and b'"role"' not in line:  # the first event comes before the first token
                    now, now_cpu = time.monotonic(), server.cpu()
                    gaps.append(now - start)
                    gaps_cpu.append(now_cpu - start_cpu)
                    start, start_cpu = now, now_cpu
                    on_event()
        return Stream(answer.status, gaps, gaps_cpu, last)
    finally:
        link.close()


# --- the hostile clients: a process of their own, so that they do not slow down who measures


async def hostile(port: int, number: int, seconds: float, answers: Counter[str]) -> None:
    """One client of kind number % 5, which goes after so many seconds."""
    rng = random.Random(number)
    await asyncio.sleep(rng.random() * min(1.0, seconds / 3))
    kinds = {0: silent, 1: endless_header, 2: large_body, 3: endless_body, 4: many_replies}
    kind = kinds[number % 5]
    told = "left"
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                told = await kind(reader, writer, rng)
            finally:
                writer.close()
    except TimeoutError:
        pass
    except (OSError, asyncio.IncompleteReadError):
        told = "closed"
    answers[f"{told} {kind.__name__}"] += 1


HEAD = "POST /v1/{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


async def status(reader: asyncio.StreamReader) -> str:
    line = await reader.readline()
    while await reader.read(1 << 16):
        pass
    return line.decode().split(" ")[1] if line else "closed"


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> str:
    return await status(reader)


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: bytes) -> str:
    answer = asyncio.create_task(status(reader))
    try:
        while not answer.done():
            writer.write(piece)
            await writer.drain()
            await asyncio.wait([answer], timeout=0.2)
    except OSError:  # the server has closed
        pass
    except asyncio.CancelledError:
        answer.cancel()
        raise
    return await answer


async def endless_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> str:
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
    return await drip(reader, writer, b"X-Y: z\r\n")


async def endless_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> str:
    writer.write(HEAD.format("chat/completions", 2_000_000).encode())
    return await drip(reader, writer, b"a" * 1000)


async def large_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> str:
    if rng.random() < 0.5:
        text = "".join(rng.choices("abcdefgh 是否", k=1000)) * 1500
        path, data = "chat/completions", {"messages": [{"role": "user", "content": text}]}
    else:
        path, data = "completions", {"prompt": [*([1] * 660_000), "a"]}
    body = json.dumps(data, ensure_ascii=False).encode()[: 2 << 20]
    writer.write((HEAD.format(path, len(body)).replace("Host", "Connection: close\r\nHost")).encode() + body)
    return await status(reader)


async def many_replies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> str:
    words = {"messages": [{"role": "user", "content": "hello " * rng.randrange(1, 40)}], "n": 64, "max_tokens": 64}
    body = json.dumps(words | {"stream": rng.random() < 0.5, "ignore_eos": True}).encode()
    head = HEAD.format("chat/completions", len(body)).replace("Host", "Connection: close\r\nHost")
    writer.write(head.encode() + body)
    return await status(reader)


async def attack(port: int, clients: int, seconds: float, seed: int) -> Counter[str]:
    """All hostile clients of one round."""
    answers: Counter[str] = Counter()
    await asyncio.gather(*(hostile(port, seed * clients + k, seconds, answers) for k in range(clients)))
    return answers


# --- the measurement


def measure(checkpoint: Path, log: Path, *, rounds: int, clients: int, seconds: float, open_files: int, tokens: int) -> Figures:
    """All figures of one server."""
    found, server = Figures(), Server(checkpoint, log, open_files)
    try:
        for _ in range(2):  # the first warms up
            with ThreadPoolExecutor(PLACES) as pool:
                alone = list(pool.map(lambda k: read_stream(server, tokens, k), range(PLACES)))
        assert all(stream.status == 200 and stream.gaps for stream in alone), alone
        found.own_gap_s = max(gap for stream in alone for gap in stream.gaps[1:])
        found.own_gap_cpu_s = max(gap for stream in alone for gap in stream.gaps_cpu[1:])
        server.wait_idle()
        found.start_bytes = server.memory()
        for number in range(rounds):
            one_round(server, found, number, clients, seconds, tokens)
        server.wait_idle()
        time.sleep(1)
        found.end_bytes = server.memory()
        end_by_signal(server, found, tokens)
    finally:
        server.process.kill()
        server.process.wait()
    found.log_bytes = log.stat().st_size
    return found


def one_round(server: Server, found: Figures, number: int, clients: int, seconds: float, tokens: int) -> None:
    """One stream after the other while the hostile clients are there."""
    begun, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            started = time.monotonic()
            try:
                server.health()
            except (OSError, AssertionError, http.client.HTTPException) as error:
                found.broken.append(f"health: {error!r}")
            found.health_s = max(found.health_s, time.monotonic() - started)
            found.peak_bytes = max(found.peak_bytes, server.memory())
            over.wait(0.2)

    def read() -> None:
        count = 0
        while not over.is_set():
            try:
                stream = read_stream(server, tokens, count, begun.set)
            except (OSError, http.client.HTTPException) as error:
                found.broken.append(repr(error))
                continue
            count += 1
            if stream.status in (429, 503):
                found.refused += 1
                over.wait(0.2)
            elif stream.status != 200 or '"error"' in stream.last:
                found.broken.append(f"{stream.status} {stream.last[:200]}")
            else:
                found.streams += 1
                found.wait_s = max(found.wait_s, stream.gaps[0])
                found.gap_s = max(found.gap_s, *stream.gaps[1:])
                found.gap_cpu_s = max(found.gap_cpu_s, *stream.gaps_cpu[1:])

    threads = [threading.Thread(target=target) for target in (watch, read)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    command = [sys.executable, "-m", "tests.trainer.chat.mixed_load", "--attack"]
    command += [str(v) for v in (server.port, clients, seconds, number)]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=seconds + 120, cwd=ROOT).stdout
    found.answers.update(json.loads(told))
    over.set()
    for thread in threads:
        thread.join()


def end_by_signal(server: Server, found: Figures, tokens: int) -> None:
    """SIGTERM in the middle of a stream."""
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, server, 100 * tokens, 0, begun.set)
        assert begun.wait(60)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        found.last_event = stream.result().last
        server.process.wait(60)
        found.exit_s = time.monotonic() - started


def tiny_checkpoint(folder: Path) -> Path:
    """A model of a moment, with a context of 512 tokens."""
    from chatmill.data.tokenizer.tokenizer import train_bpe
    from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter
    from chatmill.trainer.config import ModelConfig
    from chatmill.trainer.model.decoder import Decoder

    tokenizer = train_bpe(iter(["hello there, how are you?"] * 20), 300)
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 512}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape)
    model = Decoder(config)
    model.init_weights(1)
    with CheckpointWriter(folder, config) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        for name, data in tokenizer.files().items():
            writer.add_file(name, data)
    return folder


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["--attack"]:
        port, clients, seconds, seed = sys.argv[2:]
        print(json.dumps(asyncio.run(attack(int(port), int(clients), float(seconds), int(seed)))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    for name, kind, default in (("rounds", int, 5), ("clients", int, 230), ("seconds", float, 20.0), ("tokens", int, 300)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--open-files", type=int, default=256)
    options = vars(parser.parse_args())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.pop("checkpoint") or tiny_checkpoint(Path(folder) / "tiny")
        found = measure(checkpoint, Path(folder) / "log", **options)
        text = (Path(folder) / "log").read_text(errors="replace")
    print(json.dumps({k: v for k, v in vars(found).items() if k != "broken"}, indent=1, default=str))
    for problem in (problems := found.problems()):
        print("BROKEN:", problem)
    if problems:
        print(text[-3000:])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
