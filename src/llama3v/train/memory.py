"""Bytes that a training run holds on its device, by part, from a model on the meta device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from llama3v.train.loss import CHUNK_BYTES

if TYPE_CHECKING:
    from llama3v.config import LlmWeights
    from llama3v.model.llama3v import Llama3VForConditionalGeneration

# Bytes for each weight of a block's linear layers. NF4: half a byte, one byte for each 64 weights, and a number in fp32
# for each 256 of those (QLoRA, arXiv 2305.14314, section 3). int8: one scale for each output is too little to count.
_QUANTISED = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
GRADIENT, MOMENTS = 4, 8  # bytes per parameter that trains: fp32, and two moments of AdamW
HEAD_CHUNKS = 3  # that exist at once: logits, their logarithms, and the gradient


@dataclass(frozen=True)
class Memory:
    """Bytes by part; `shared` are the parts that FSDP divides among GPUs."""

    parts: dict[str, int]
    shared: frozenset[str]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def on(self, gpus: int) -> int:
        """Bytes on one of so many GPUs that share weights, gradients and moments."""
        return sum(size // gpus if part in self.shared else size for part, size in self.parts.items())


def memory_of(
    model: "Llama3VForConditionalGeneration", llm_weights: "LlmWeights", activations: dict[str, int], copies: int
) -> Memory:
    """The memory of a run of this model.

    Args:
        model: on the meta device, with what trains marked. llm_weights: how its LLM is to be held.
        activations: of one pass, by part. copies: bytes of weights in the precision of the products.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = {
        "vision tower": _bytes(model.vision),
        "projector": _bytes(model.projector),
        "LLM": _llm_bytes(model.llm, llm_weights),
        "gradients": GRADIENT * trained,
        "optimizer": MOMENTS * trained,
        "weights in bf16": copies,
    }
    passing = {f"activations: {part}": size for part, size in activations.items()}
    passing["logits, in chunks"] = HEAD_CHUNKS * CHUNK_BYTES
    return Memory({part: size for part, size in {**held, **passing}.items() if size}, frozenset(held))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _llm_bytes(llm: nn.Module, weights: "LlmWeights") -> int:
    if weights not in _QUANTISED:
        return _bytes(llm)
    head = llm.get_output_embeddings()  # type: ignore[operator]
    linear = sum(
        module.weight.numel()
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    )
    element = next(iter(head.parameters())).element_size()
    return _bytes(llm) - element * linear + int(_QUANTISED[weights] * linear)
