"""Does a tensor of [tokens, vocabulary] exist? And what does a step take in memory, with and without one?"""

import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import ROOT, row

HAS_PEAK_MEMORY = sys.platform == "linux"


class LogitsSeen(TorchDispatchMode):
    """Watches every tensor that any operation makes, forward and backward, and notes the most rows of logits at once.

    Rows of logits: the product of all dimensions but the last, where the last one is the vocabulary. Views of the
    weights do not count.
    """

    def __init__(self, vocabulary: int, model: torch.nn.Module) -> None:
        super().__init__()
        self.vocabulary, self.most_rows = vocabulary, 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if self._is_logits(value):
                self.most_rows = max(self.most_rows, value.numel() // self.vocabulary)
        return result

    def _is_logits(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[-1] != self.vocabulary:
            return False
        return value.untyped_storage().data_ptr() not in self._weights


def measure_memory(tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows: a step's peak memory beside the usual one's, and the most rows of logits at once. Linux only."""
    found = {side: _in_a_process(side, tokens, vocabulary) for side in ("ours", "usual")}
    ours, usual = found["ours"], found["usual"]
    shape = f"one row of {tokens:,} tokens, {ours['supervised']:,} of them supervised, vocabulary {vocabulary:,}"
    full = 4 * tokens * vocabulary / 2**20
    return [
        row(
            f"peak memory of a step at {tokens:,} tokens and a vocabulary of {vocabulary:,}, weights and moments aside",
            ours["mib"],
            usual["mib"],
            unit="MiB",
            note=f"{shape}; a Llama of 2 layers, width 256, all of it trains; full logits alone are {full:,.0f} MiB in fp32",
        ),
        row(
            "the most rows of logits that exist at once",
            ours["most_rows"],
            usual["most_rows"],
            limit=tokens,
            unit="rows",
            note=f"{shape}; of all tensors of all operations, forward and backward; the limit is the tokens",
        ),
    ]


def _in_a_process(side: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_logits", side, str(tokens), str(vocabulary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_side(side: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    """One side, in a process of its own: MiB at the peak of a step beyond what was held before, and rows of logits."""
    from benchmarks.train_shapes import TINY, LlmShape, ModelShape, Sample, prepared

    shape = ModelShape(TINY.tower, LlmShape(256, 2, 4, 2, 512, vocabulary, tied=True))
    data = prepared([Sample(1, 12, 4), Sample(1, tokens - shape.tokens_per_tile, tokens // 4)], shape)
    step, model = _ours(shape, data) if side == "ours" else _usual(shape, data)
    step(0)  # so that the moments are there
    before = _reset_peak()
    step(1)
    mib = (_memory("VmHWM") - before) / 2**10
    with LogitsSeen(vocabulary, model) as seen:
        step(1)
    return {"mib": mib, "most_rows": seen.most_rows, "supervised": int(data.labels[1])}


def _ours(shape: Any, data: Any) -> Any:
    from benchmarks.train_shapes import RandomFeatures, random_model
    from benchmarks.train_step import adamw, optimizer_step, set_modes, trained
    from llama3v.train.batches import assemble

    model = random_model(shape)
    model.projector.requires_grad_(True)
    model.llm.requires_grad_(True)
    set_modes(model)
    optimizer, source = adamw(trained(model)), RandomFeatures(shape.tower, stock=2)

    def step(sample: int) -> None:
        batch = assemble(data, [[sample]], source, shape.llm.vocabulary)
        optimizer_step(model, optimizer, [(batch, batch.supervised_tokens)])

    return step, model


def _usual(shape: Any, data: Any) -> Any:
    from benchmarks.train_step import adamw, trained
    from benchmarks.train_usual import UsualModel, padded, usual_step

    model = UsualModel(shape, shape.tower.layers, trains=("projector", "llm"))
    optimizer = adamw(trained(model))
    return lambda sample: usual_step(model, optimizer, padded(data, [sample], 1, shape.tower.tile_size)), model


def _memory(name: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its peak."""
    from pathlib import Path

    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def _reset_peak() -> int:
    """Let the peak begin anew; returns KiB that are held now."""
    from pathlib import Path

    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


if __name__ == "__main__":
    print(json.dumps(measure_side(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
