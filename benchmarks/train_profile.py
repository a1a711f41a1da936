"""Where the time of the trainer's step goes on a CPU, by part of the model and by kind of operation."""

from contextlib import ExitStack
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import row
from benchmarks.train_ours import Ours
from benchmarks.train_shapes import LlmShape, ModelShape, TowerShape, counts_of, random_samples
from llama3v.train.work import work_of

QUICKSTART = ModelShape(TowerShape(72, 12, 192, 6, 512, 5), LlmShape(128, 4, 4, 2, 384, 640, tied=True), scale_factor=2)
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn"),
    "attention": ("attention", "flash"),
    "optimizer and clipping": ("fused_adam", "_foreach", "Optimizer"),
    "loss": ("log_softmax", "ChunkedCrossEntropy", "gather", "scatter", "exp"),
}
REST = "element-wise, norms, copies and the rest"


def measure_quickstart() -> dict[str, Any]:
    """The row of a model of the quickstart's size."""
    samples = random_samples(16, [1], (20, 60), 0.3)
    with ExitStack() as stack:
        ours = Ours(QUICKSTART, samples, trains=("projector", "llm"), stack=stack)
        ours.step()
        return profile_row("a model of the quickstart's size, stage 2", ours)


def profile_row(name: str, ours: Ours) -> dict[str, Any]:
    """Where the time of one step goes; it has been run before."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours.step()
    parts = parts_of_work(ours)
    shares: dict[str, float] = {}
    total = sum(event.self_cpu_time_total for event in profiler.key_averages())
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total / total
    told = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares.items(), key=lambda item: -item[1]))
    work = ", ".join(f"{part} {share:.1%}" for part, share in parts.items())
    return row(f"{name}: where the time of ours goes", shares.get("matrix products", 0.0), unit="share of matrix products",
               note=f"{told}; of the useful operations: {work}")  # fmt: skip


def parts_of_work(ours: Ours) -> dict[str, float]:
    """The share of the useful operations that each part of the model has."""
    work, counts = work_of(ours.model, live_trunk=False), counts_of(ours.batch())
    tokens, tiles = counts["visual_tokens"] + counts["text_tokens"], counts["tiles"]
    flops = {
        "projector blocks": work.blocks.flops(tiles * work.patches, tiles * work.patches**2),
        "projector linear": work.linear.flops(tiles * work.visual_tokens),
        "LLM layers": work.llm.flops(tokens, counts["attention_pairs"]),
        "LM head": work.head.flops(counts["supervised_tokens"]),
    }
    return {part: value / sum(flops.values()) for part, value in flops.items()}


def kind_of(operation: str) -> str:
    """The kind of an operation, by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), REST)
