"""The parts of the benchmark, in the order in which they run. Each is one process (`python -m benchmarks.gpu --part NAME`).

Imports no torch: the process that starts them stays small and off the GPU.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
        stage: 1, captions: one tile and 60 tokens of text; 2, conversations: seven tiles and 200 tokens on average.
        trains: what does, beside the projector in every case.
        weights: how they are held. "fp32" is fp32 with bf16 products (autocast); "bf16 frozen" has the LLM in bf16 and
            what trains in fp32; "bf16" has everything in bf16, gradients and both of AdamW's moments included: 8 bytes
            for each parameter that trains. (With 16 bytes, as the trainer has by default, 8B would take 130 GB.)
        recompute: whether activations are computed again on the way back instead of kept.
        compiled: whether the LLM's layers go through torch.compile, each for itself.
    """

    stage: Literal[1, 2]
    trains: Literal["projector", "lora", "full"]
    weights: Literal["fp32", "bf16 frozen", "bf16"]
    recompute: bool = False
    compiled: bool = False

    @property
    def what(self) -> str:
        trains = {"projector": "projector trains, LLM frozen", "lora": "LoRA", "full": "LLM and projector train"}
        weights = {
            "fp32": "fp32 weights, bf16 products",
            "bf16 frozen": "frozen weights in bf16",
            "bf16": "all in bf16",
        }
        more = [" with recomputing" if self.recompute else "", ", compiled" if self.compiled else ""]
        return f"{trains[self.trains]}; {weights[self.weights]}{''.join(more)}"


@dataclass(frozen=True)
class Part:
    """Attributes:
    name: as `--part` takes it.
    seconds: what it is expected to take on an H100, start of the process included; with less time left it is left out.
    compiled: of the encode pass. training: where the part is one.
    """

    name: str
    seconds: int
    kind: Literal["gemm", "encode", "training"]
    compiled: bool = False
    training: Training | None = None


PARTS = (
    Part("gemm", 20, "gemm"),
    Part("encode", 30, "encode"),
    Part("stage1", 45, "training", training=Training(1, "projector", "bf16 frozen")),
    Part("stage2-full", 55, "training", training=Training(2, "full", "bf16", recompute=True)),
    Part("stage2-lora", 50, "training", training=Training(2, "lora", "bf16 frozen")),
    Part("encode-compiled", 75, "encode", compiled=True),
    Part("stage1-compiled", 60, "training", training=Training(1, "projector", "bf16 frozen", compiled=True)),
    Part("stage2-full-kept", 50, "training", training=Training(2, "full", "bf16")),
    Part("stage2-full-compiled", 70, "training", training=Training(2, "full", "bf16", compiled=True)),
    Part("stage1-fp32", 60, "training", training=Training(1, "projector", "fp32")),
    Part("stage2-lora-compiled", 65, "training", training=Training(2, "lora", "bf16 frozen", compiled=True)),
)
