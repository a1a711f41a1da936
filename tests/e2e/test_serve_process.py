"""`llama3v serve` as a process: it says where it is, drains on SIGTERM, and a killed one leaves its clients a clean end."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

import httpx2

from tests.serving import image_part, png, text_part

CONTENT = [image_part(png(1, (84, 42))), text_part("What is it?")]
BODY = {"messages": [{"role": "user", "content": CONTENT}], "max_tokens": 200, "stream": True}


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of the verb, from when it serves."""
    command = [sys.executable, "-m", "llama3v", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"at (http://127\.0\.0\.1:\d+) ", line):
                yield found[1], process
                return
        pytest.fail(f"it ended with {process.wait()}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow  # two processes that load torch: more than 20 seconds on a busy machine
def test_a_process_drains_on_sigterm_and_a_killed_one_leaves_a_clean_end_and_a_sound_cache(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cache = ("--vision-cache-dir", str(tmp_path / "kept"))
    with serving(tiny_model_dir, *cache) as (address, process):
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=BODY, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx2.HTTPError):  # at once, and no half of an answer passes for a whole one
                list(lines)
        assert process.wait(10) == -signal.SIGKILL
    with serving(tiny_model_dir, *cache) as (address, process):
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=BODY, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(first.removeprefix("data: "))["object"] == "chat.completion.chunk"
        assert process.wait(20) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")
