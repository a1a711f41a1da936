"""The verb `doctor`: look, measure, and say what this machine can run."""

import json
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from llama3v.config import DoctorConfig
from llama3v.diagnosis import machine, measure

LLMS = {"Llama 3 8B": 8.03e9, "Llama 3.2 3B": 3.21e9, "Llama 3.2 1B": 1.24e9, "SmolLM2 135M": 0.135e9}
"""Language model -> weights."""
FORMATS = {"bf16": 2.0, "q8_0": 1.0625, "q4_k_m": 0.61}
"""Format -> bytes of a weight, with its scales."""
OF_LLAMACPP = ("q8_0", "q4_k_m")
"""Formats of GGUF pairs alone: the llama.cpp that this package runs computes on the CPU, beside any GPU."""
BESIDE = 3e9
"""Bytes beside an LLM: a tower of so400m in fp32, a KV cache, and the program."""


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print what this machine can run, how fast (measured here and now), and what to install.

    Returns the same as {"machine", "advice", "extras", "gemm", "bandwidth", "cpu_bandwidth", "tile_seconds",
    "tokens_per_second", "models"}: operations and bytes per second; per engine seconds of a tile, tokens per second, or
    why it cannot.
    """
    console = Console(stderr=config.json, highlight=False)
    with console.status("Looking") as status:
        found = machine.facts()
        status.update("Measuring matrix products and memory")
        gemm, bandwidth = measure.products(), measure.bandwidth()
        cpu_bandwidth = bandwidth if found["accelerator"] is None else measure.bandwidth("cpu")
        status.update("Measuring the vision tower, engine by engine")
        towers = measure.towers(config.seconds)
        status.update("Measuring answers of the embedded model, engine by engine")
        decoders = measure.decoders()
    report = {
        "verb": "doctor",
        "machine": found,
        "advice": machine.advice(found),
        "extras": {
            extra.name: {"missing": list(extra.missing), "command": extra.command} for extra in machine.extras()
        },
        "gemm": gemm,
        "bandwidth": bandwidth,
        "cpu_bandwidth": cpu_bandwidth,
        "tile_seconds": towers,
        "tokens_per_second": decoders,
        "models": models(
            (found["memory_available"], cpu_bandwidth),
            (found["gpu_memory_available"] or found["memory_available"], bandwidth),
        ),
    }
    if config.json:
        print(json.dumps(report))
    else:
        Console(highlight=False).print(in_words(report))
    return report


def models(main: tuple[float, float], best: tuple[float, float]) -> dict[str, dict[str, float | None]]:
    """LLM -> format -> tokens per second that memory allows at most; None where it does not fit.

    Args:
        main, best: (bytes available, bytes per second) of main memory, and of the device that PyTorch computes on.
    """

    def speed(weights: float, kind: str) -> float | None:
        available, bandwidth = main if kind in OF_LLAMACPP else best
        size = weights * FORMATS[kind]
        return bandwidth / size if size + BESIDE <= available else None

    return {name: {kind: speed(weights, kind) for kind in FORMATS} for name, weights in LLMS.items()}


def in_words(report: dict[str, Any]) -> Group:
    """The report as tables."""
    parts = [_machine(report), _engines(report), _models(report), _extras(report)]
    notes = [f"[yellow]note:[/] {escape(line)}" for line in report["advice"]]
    return Group(*(Group(part, "") for part in parts), *notes)


def _machine(report: dict[str, Any]) -> Table:
    found, gemm = report["machine"], report["gemm"]
    table = _table("This machine", "", "")
    threads = f"{found['cores']} cores, {found['threads']} threads in PyTorch"
    rows = {
        "system": found["system"],
        "processor": f"{found['processor']}, {threads}",
        "accelerator": found["accelerator"] or "none that PyTorch can use",
        "memory": f"{found['memory'] / 1e9:.1f} GB, {found['memory_available'] / 1e9:.1f} GB available",
        "disk": f"{found['disk_free'] / 1e9:,.0f} GB free here",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "matrix products": f"{gemm['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {gemm['bf16'] / 1e9:,.0f} in bf16",
        "reading weights": f"{report['bandwidth'] / 1e9:,.1f} GB/s",
    }
    if found["accelerator"] is not None:
        rows["reading weights"] += f", {report['cpu_bandwidth'] / 1e9:,.1f} on the CPU"
    if found["gpu_memory"] is not None:
        rows["memory"] += (
            f"; GPU {found['gpu_memory'] / 1e9:.1f} GB, {found['gpu_memory_available'] / 1e9:.1f} GB available"
        )
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table


def _engines(report: dict[str, Any]) -> Table:
    table = _table("Engines", "engine", "a tile of SigLIP so400m", "answers of the embedded model")
    names = {"torch": "torch", "openvino": "", "onnxruntime": "", "llamacpp": "llamacpp", "mlx": "mlx"}
    for name, decoder in names.items():
        tile, tokens = report["tile_seconds"].get(name), report["tokens_per_second"].get(decoder)
        table.add_row(name, _cell(tile, "{:.3g} s"), _cell(tokens, "{:,.0f} tokens/s"))
    return table


def _models(report: dict[str, Any]) -> Table:
    on_gpu = report["machine"]["accelerator"] is not None
    columns = [f"{kind} (CPU)" if on_gpu and kind in OF_LLAMACPP else kind for kind in FORMATS]
    table = _table("Answers, at most (memory and its bandwidth alone)", "language model", *columns)
    for name, speeds in report["models"].items():
        cells = (f"{speed:.3g} tokens/s" if speed else "[dim]too large[/]" for speed in speeds.values())
        table.add_row(name, *cells)
    return table


def _extras(report: dict[str, Any]) -> Table:
    table = _table("Extras", "extra", "what for", "state")
    for name, extra in report["extras"].items():
        lacks = ", ".join(extra["missing"])
        state = (
            f"[yellow]{escape(extra['command'])}[/]  [dim](lacks {escape(lacks)})[/]"
            if lacks
            else "[green]installed[/]"
        )
        table.add_row(name, machine.USES[name], state)
    return table


def _cell(value: float | str | None, form: str) -> str:
    if value is None:
        return "[dim]-[/]"
    if not isinstance(value, str):
        return form.format(value)
    return "[dim]not installed[/]" if "not installed" in value else f"[red]{escape(value)}[/]"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns), pad_edge=False)
    table.box = None
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table
