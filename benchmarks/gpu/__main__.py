"""The process that starts the parts one by one and writes down what they found; see the package's docstring."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[2]
if find_spec("llama3v") is None:  # a checkout on a machine where nothing is installed
    sys.path.insert(0, str(ROOT / "src"))

from benchmarks.common import document, in_words  # noqa: E402
from benchmarks.gpu.parts import PARTS, Part  # noqa: E402
from benchmarks.gpu.rows import REAL_SHAPE, rows_of  # noqa: E402

PATIENCE = 2.5  # times what a part is expected to take, before it is taken to hang
RESERVE = 10.0  # seconds for the last part to be ended and the results to be written


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that are asked for, within the time that is given."""
    options = _options(arguments)
    if options.part:
        from benchmarks.gpu.run_part import run_part

        Path(options.figures).write_text(json.dumps(run_part(options.part, options.shape)))
        return
    deadline = perf_counter() + 60 * options.minutes
    figures: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        figures[part.name] = _figures_of(part, options, deadline)
        _tell(part, figures[part.name])
        _write(options, figures)
    for row in rows_of(figures, options.dollars_per_hour, options.shape):
        print(in_words(row), flush=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=sys.modules["benchmarks.gpu"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the results, written anew after each part")
    parser.add_argument("--shape", choices=[REAL_SHAPE, "tiny"], default=REAL_SHAPE)
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything; what does not fit is left out")
    parser.add_argument("--dollars-per-hour", type=float, default=2.29, help="price of the GPU (H100 on demand, 2026)")
    parser.add_argument("--parts", nargs="*", choices=names, help="only these")
    parser.add_argument("--in-one-process", action="store_true", help="quicker, but one part may take the others along")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # what the processes of parts are given
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _figures_of(part: Part, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    left = deadline - perf_counter() - RESERVE
    needs = part.seconds if options.shape == REAL_SHAPE else 1
    if left < needs:
        return {
            "error": f"left out: {max(0, left):.0f} s are left of --minutes {options.minutes:g}, and it takes about {needs} s"
        }
    if options.in_one_process:
        from benchmarks.gpu.run_part import run_part

        return run_part(part.name, options.shape)
    with tempfile.TemporaryDirectory() as temporary:
        return _in_a_process(part, options.shape, Path(temporary), min(left, PATIENCE * max(part.seconds, 60)))


def _in_a_process(part: Part, shape: str, directory: Path, seconds: float) -> dict[str, Any]:
    path, said = directory / "figures.json", directory / "stderr"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--shape", shape, "--figures", str(path)]
    # parts of different sizes of pass leave holes otherwise; both names, because torch has renamed it
    allocation = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | allocation, stdout=file, stderr=file)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"error": f"ended after {seconds:.0f} s without a result"}
    text = said.read_text(errors="replace")
    if code or not path.exists():
        print(text, file=sys.stderr)
        last = text.strip().splitlines()[-1:] or ["nothing"]
        return {"error": f"its process ended with code {code} and said at last: {last[0][:300]}"}
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def _tell(part: Part, figures: dict[str, Any]) -> None:
    said = figures.get("error", f"measured in {figures.get('seconds', 0):.0f} s")
    print(f"{part.name}: {said}", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> None:
    """Everything so far, in one go: a reader never sees half a file."""
    if options.json is None:
        return
    environment = figures.get("gemm", {}).get("environment", {})
    content = document(
        rows_of(figures, options.dollars_per_hour, options.shape),
        machine=environment.get("machine", {}),
        versions=environment.get("versions", {}),
        shape=options.shape,
        dollars_per_hour=options.dollars_per_hour,
        missing={name: part["error"] for name, part in figures.items() if "error" in part},
        figures=figures,
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.json.with_name(f".{options.json.name}.writing")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(options.json)


if __name__ == "__main__":
    main()
