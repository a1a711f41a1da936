"""What the tests of training share: a small data set of coloured pictures, its cache, and runs in child processes."""

import json
import multiprocessing.forkserver
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FAULT_VARIABLE = "LLAMA3V_TEST_FAULT"
"""KIND:RANK:NUMBER, what goes wrong in a child, on which rank, and when (training_child.inject)."""

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}


def make_pictures(directory: Path, count: int = 16, side: int = 40) -> Path:
    """Pictures of one colour each, some wide enough to be sliced, and a LLaVA JSON that asks for the colour."""
    random = np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        width, height = (side, side) if number % 8 < 4 else (3 * side, side)
        pixels = np.array(COLOURS[colour]) + random.integers(-20, 20, (height, width, 3))
        name = f"images/{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(directory / name)
        turns = [("human", "<image>\nWhat colour?"), ("gpt", f"It is {colour}.")]
        rows.append(
            {
                "id": f"picture-{number}",
                "image": name,
                "conversations": [{"from": role, "value": text} for role, text in turns],
            }
        )
    path = directory / "train.json"
    path.write_text(json.dumps(rows))
    return path


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) and (step, validation loss), line by line, as a finished run left them."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record.get("loss", record.get("validation_loss"))) for record in records]


def log_of(options: Any) -> Path:
    """Where the children of `start` print."""
    return options.out.with_name(options.out.name + ".log")


def _start_server(context: Any) -> None:
    """Before Python 3.13 the server does not get our sys.path, and leaves out silently what it cannot import."""
    context.set_forkserver_preload(["training_child"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(verb: str, options: Any, environment: dict[str, str] | None = None) -> Any:
    """Run a verb in a child process of its own; one server process has imported everything and forks them.

    What it prints goes to `log_of(options)`.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server(context)
    from training_child import run

    process = context.Process(target=run, args=(verb, options, environment or {}, log_of(options)))
    process.start()
    return process
