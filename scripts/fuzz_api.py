"""schemathesis over the gateway's OpenAPI document: requests that it makes up, right and wrong, in a bounded time.

    python -m venv fuzz && fuzz/bin/pip install schemathesis        (an environment of its own: it has other versions)
    python scripts/fuzz_api.py --program fuzz/bin/schemathesis --json benchmarks/results/fuzz_api.json

Serves a tiny model of random weights in a process of its own meanwhile. Found would be: a 5xx, an answer or a header that the
document does not have, a request against the document that is obeyed, a server that ended, work that was left over, and an
end on SIGTERM that is not clean. Not asked is whether everything that fits the document is obeyed: no schema can say that
the user speaks last, or that bytes are a picture. Takes --seconds and half a minute; prints what was found, and writes it
with the number of requests by status and the server's memory. Words after -- go on to schemathesis.
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import document, machine, row, versions  # noqa: E402

OPTIONS = ["--max-new-tokens", "4", "--max-body-mb", "8", "--deadline-seconds", "30", "--name", "tiny"]
_START_SECONDS = 120


def main() -> int:
    """Serve, run, write. 0 where nothing was found."""
    arguments, more = _arguments()
    program = shutil.which(arguments.program)
    if program is None:
        print(f"there is no {arguments.program}: pip install schemathesis, then --program PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _make_model(Path(folder) / "model")
        with _serving(Path(folder)) as (address, process):
            at_start = _megabytes(process, "VmHWM")
            command = [
                str(Path(program).absolute()),
                "run",
                f"{address}/openapi.json",
                "--report-json-path",
                str(report),
                *more,
            ]
            command += ["--max-time", str(arguments.seconds), "--seed", str(arguments.seed), "--checks", "all"]
            command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
            command += ["--generation-database", "none", "--report", "json", "--no-color"]
            subprocess.run(command, check=False, timeout=arguments.seconds + 300, cwd=folder)  # it keeps files there
            lives = process.poll() is None
            metrics = _metrics(address) if lives else ""
            memory = (at_start, _megabytes(process, "VmHWM") if lives else None)
            process.send_signal(signal.SIGTERM)
            clean = lives and process.wait(60) == 0
        found = json.loads(report.read_text())
    return _tell(arguments.json, found, metrics, memory, clean)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="schemathesis", help="schemathesis' command")
    parser.add_argument("--seconds", type=int, default=180, help="time for requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the results")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:split]), words[split + 1 :]


def _make_model(folder: Path) -> None:
    from llama3v.model.llama3v import build_model, save_model

    assets = ROOT / "src/llama3v/assets"
    built = build_model(str(assets / "siglip-scenes"), str(assets / "llama-scenes"), scale_factor=3, max_tiles=4)
    save_model(*built, folder)


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of the verb, from when it serves."""
    log = folder / "log"
    command = [sys.executable, "-m", "llama3v", "serve", str(folder / "model"), "--port", "0", *OPTIONS]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        end = time.monotonic() + _START_SECONDS
        while (told := re.search(r"at (http://127\.0\.0\.1:\d+) ", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server does not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield told[1], process
    finally:
        process.kill()
        process.wait()
        errors = [line for line in log.read_text().splitlines() if " ERROR " in line]
        print("\n".join(["the server's errors:", *errors] if errors else ["the server's log has no errors"]))


def _megabytes(process: subprocess.Popen[bytes], name: str) -> float | None:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return int(found[1]) / 1024 if found else None


def _metrics(address: str) -> str:
    time.sleep(1)  # for the last client's leaving to be noticed
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def _tell(
    path: Path | None, found: dict[str, Any], metrics: str, memory: tuple[float | None, float | None], clean: bool
) -> int:
    statuses: Counter[str] = Counter()
    for status, count in re.findall(r'llama3v_requests_total\{.*?status="(\d+)"\} ([\d.e+]+)', metrics):
        statuses[status] += int(float(count))
    held = re.findall(r"^llama3v_(?:waiting|running|request_bytes) (\S+)", metrics, flags=re.MULTILINE)
    left_over = held != ["0.0"] * 3
    cases = found["test_cases"]
    kinds = {failure["title"]: failure["operations"] for failure in found["failures"]}
    rows = [
        row("requests", cases["generated"], unit="requests", note=f"by status {dict(sorted(statuses.items()))}"),
        row("findings", cases["unique_failures"] + cases["errored"], unit="findings", note=json.dumps(kinds)),
        row("server errors", sum(n for status, n in statuses.items() if status[0] == "5"), unit="responses"),
        row("memory at the start", memory[0], unit="MB", note="the most until then; a tiny model, and torch"),
        row("peak memory", memory[1], unit="MB"),
    ]
    results = document(
        rows,
        machine=machine(),
        versions=versions("fastapi", "uvicorn", "pydantic"),
        schemathesis=found["schemathesis_version"],
        seed=found["seed"],
        seconds=round(found["running_time"]),
        phases={name: phase["status"] for name, phase in found["phases"].items()},
        complete=found["complete"],
        nothing_left_over=not left_over,
        clean_end=clean,
    )
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    results["command"] = f"python scripts/fuzz_api.py {shlex.join(words)}".strip()
    for entry in rows:
        print(f"{entry['name']}: {entry['ours']} {entry['unit']} {entry['note']}")
    print(f"nothing is left over: {not left_over}; it ended cleanly: {clean}")
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(rows[1]["ours"]) or not clean or left_over or not found["complete"])


if __name__ == "__main__":
    sys.exit(main())
