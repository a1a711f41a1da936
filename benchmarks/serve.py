"""`llama3v serve` under load, and beside llama-server on the same GGUF pair.

    python -m benchmarks.serve --json benchmarks/results/serve.json

Three parts, all over loopback with the same client:

1. Text: questions without a picture, several clients, both servers in turns. Tokens per second, time to the first text.
2. A repeated picture: other questions about one picture that both have seen, answered in two tokens at most.
   No question comes twice or begins like another: llama-server keeps prompts that it has read in memory, far more of them
   than there are conversations, and would not read such a one again.
3. Load, ours alone: 64 clients for --seconds, texts and pictures mixed; a fifth of the requests is left at a random moment, a
   tenth is read slowly. Each answer that ends is compared with the answer alone; afterwards nothing may be left in work, and
   the server's memory is stated at the beginning and at the end.

The projector is untrained: what is measured is speed and sameness. The embedded LLM ends most answers after a token or two,
so that with it requests are measured, the servers alone; --llm takes one that says more, --pair a whole pair. Tokens are
those of the texts that arrive, counted by the pair's tokenizer: servers differ in whether the token that ends an answer is in
their `usage`.
"""

import argparse
import asyncio
import functools
import itertools
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from tokenizers import Tokenizer

from benchmarks.common import ROOT, row, write_results
from benchmarks.serve_clients import TEXTS, Timing, load, mixed, picture, question, together

CONTEXT = 1024
Count = Callable[[str], int]
_ANSWER = 32
_ABOUT_A_PICTURE = 2  # an untrained projector makes noise of it, which ends early in one server and late in the other


def make_pair(folder: Path, llm: str | None = None) -> Path:
    """The embedded tower, with the embedded or another LLM, as a GGUF pair."""
    from llama3v.config import ExportConfig
    from llama3v.exporters.verbs import export
    from llama3v.model.llama3v import build_model, save_model

    assets = ROOT / "src/llama3v/assets"
    model, tokenizer = build_model(
        str(assets / "siglip-scenes"), llm or str(assets / "llama-scenes"), scale_factor=3, max_tiles=4
    )
    save_model(model, tokenizer, folder / "model")
    export(ExportConfig(out=folder / "pair", model=str(folder / "model"), format="gguf", weights="q8_0", check=False))
    return folder / "pair"


@contextmanager
def child(command: list[str], port: int) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process of its own, from when it answers."""
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command[:4]} ended"
            try:
                if httpx2.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def memory_mb(process: subprocess.Popen, name: str) -> float:
    """VmRSS or VmHWM of a process, in MB."""
    words = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", words)[1]) / 1024  # type: ignore[index]


def compared(
    ours: str,
    peer: str,
    part: str,
    new: Callable[[], dict[str, Any]],
    count: int,
    clients: int,
    rounds: int,
    tokens_of: Count,
) -> list[dict]:
    """Rows of one kind of question, `count` new ones a round, both servers in turns; the first round is not counted."""
    speeds: dict[str, list[float]] = {ours: [], peer: []}
    requests: dict[str, list[float]] = {ours: [], peer: []}
    timings: dict[str, list[Timing]] = {ours: [], peer: []}
    for number in range(rounds + 1):
        bodies = [new() for _ in range(count)]
        for address in (ours, peer):
            found, whole = asyncio.run(together(address, bodies, clients))
            if number:
                speeds[address].append(sum(tokens_of(timing.text) for timing in found) / whole)
                requests[address].append(len(found) / whole)
                timings[address] += found
    note = f"{clients} clients, {count} new questions in each of {rounds} rounds"
    said = {address: sum(tokens_of(timing.text) for timing in found) / len(found) for address, found in timings.items()}
    rows = [
        row(f"{part}: tokens/s", median(speeds[ours]), median(speeds[peer]), unit="tokens/s", note=note),
        row(f"{part}: requests/s", median(requests[ours]), median(requests[peer]), unit="requests/s", note=note),
        row(f"{part}: tokens an answer", said[ours], said[peer], unit="tokens", note="of its text, without the end"),
    ]
    for share in (50, 99):
        first = {address: quantile([timing.first for timing in timings[address]], share) for address in (ours, peer)}
        rows.append(row(f"{part}: first text p{share}", first[ours], first[peer], unit="s", note=note))
    return rows


def quantile(values: list[float], share: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


def under_load(address: str, process: subprocess.Popen, clients: int, seconds: float) -> list[dict]:
    """Rows of the load test."""
    bodies = mixed(tokens=_ANSWER)
    asyncio.run(load(address, bodies, clients, min(10.0, seconds / 6), seed=1))  # caches and pools are full now
    before = memory_mb(process, "VmRSS")
    found = asyncio.run(load(address, bodies, clients, seconds))
    leaked = left_over(address)
    after = memory_mb(process, "VmRSS")
    first = [timing.first for timing in found.timings]
    tokens = sum(timing.tokens for timing in found.timings)
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(found.statuses.items(), key=str))
    note = f"{clients} clients for {seconds:.0f} s"
    return [
        row(
            "load: answers that differ from the answer alone",
            found.wrong,
            unit="answers",
            note=f"of {found.right + found.wrong}",
        ),
        row("load: requests left over", leaked, unit="requests", note=f"{found.left} were left by their clients"),
        row("load: requests", sum(found.statuses.values()), unit="requests", note=f"by status {statuses}; {note}"),
        row("load: read slowly", found.read_slowly, unit="requests"),
        row("load: tokens/s", tokens / seconds, unit="tokens/s", note="of answers that were read at once"),
        row("load: first text p50", quantile(first, 50), unit="s", note="waiting included"),
        row("load: first text p99", quantile(first, 99), unit="s", note="waiting included"),
        row("load: memory before", before, unit="MB", note="resident, after a warm-up under the same load"),
        row("load: memory after", after, unit="MB", note=f"resident; peak {memory_mb(process, 'VmHWM'):.0f}"),
    ]


def left_over(address: str) -> float:
    """Requests in work, waiting or held after everybody has left."""
    for _ in range(50):
        text = httpx2.get(f"{address}/metrics", timeout=30).text
        found = {name: float(re.search(rf"^llama3v_{name} (\S+)", text, re.MULTILINE)[1]) for name in _GAUGES}  # type: ignore[index]
        if not any(found.values()):
            return 0
        time.sleep(0.2)
    return found["running"] + found["waiting"] or 1


_GAUGES = ("running", "waiting", "request_bytes")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--pair", type=Path, help="a GGUF pair of `llama3v export` (default: made of the embedded weights)"
    )
    parser.add_argument("--llm", help="instead of the embedded one: a directory or GGUF file")
    parser.add_argument("--seconds", type=float, default=180, help="of the load test")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=48, help="of each round of parts 1 and 2")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = given.pair or make_pair(Path(folder), given.llm)
        rows = measure(pair, given)
    write_results(given.json, rows, ("xllamacpp", "fastapi", "uvicorn", "httpx2"))


def measure(pair: Path, given: argparse.Namespace) -> list[dict]:
    """All rows."""
    ports = free_port(), free_port()
    serve = [sys.executable, "-m", "llama3v", "serve", str(pair), "--port", str(ports[0]), "--warmup"]
    serve += ["--parallel", "4", "--queue", "256"]
    files = [str(pair / name) for name in ("model.gguf", "mmproj.gguf")]
    tokenizer = Tokenizer.from_file(str(pair / "tokenizer.json"))

    def tokens_of(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    peer = [sys.executable, "-m", "benchmarks.serve_peer", *files, str(ports[1]), "4", str(CONTEXT)]
    url = picture(0, (90, 90))
    numbers = itertools.count()

    def new(*pictures: str, tokens: int = _ANSWER) -> dict[str, Any]:
        number = next(numbers)
        return question(f"{number}: {TEXTS[number % 6]}", *pictures, tokens=tokens)

    with child(serve, ports[0]) as (ours, process):
        with child(peer, ports[1]) as (theirs, _):
            few, many = given.questions // 4, given.questions
            rows = compared(ours, theirs, "text, one client", new, few, 1, given.rounds, tokens_of)
            rows += compared(ours, theirs, "text", new, many, 8, given.rounds, tokens_of)
            rows += compared(
                ours,
                theirs,
                "a repeated picture",
                functools.partial(new, url, tokens=_ABOUT_A_PICTURE),
                many,
                8,
                given.rounds,
                tokens_of,
            )
        return rows + under_load(ours, process, given.clients, given.seconds)


if __name__ == "__main__":
    main()
