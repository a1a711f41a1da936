"""How an LLM that does not train is held in memory: fp32, bf16, or in 8 or 4 bits through bitsandbytes.

bitsandbytes is the library that QLoRA (arXiv 2305.14314) came with and that this field's recipes use: NF4, kept by its
authors and Hugging Face, on CUDA and CPUs. torchao was looked at, too: its 4-bit kernels need one more library for each
kind of device, and its releases follow single releases of torch. In 8 bits only bitsandbytes' quantisation is used: its
own 8-bit layer rounds activations, too, which no plain weights can do after it.

Weights that are held in fewer bits are other weights. What a model has learnt, it has learnt beside these; so `release`
gives the very values that were held, as plain weights, and a model is asked, exported and merged with them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama3v.errors import ConfigError

if TYPE_CHECKING:
    from llama3v.config import LlmWeights


def loading_dtype(weights: "LlmWeights", precision: str) -> torch.dtype:
    """The type in which an LLM is read from disk to be held so: bf16 where that is what computes with it, else fp32."""
    return torch.bfloat16 if weights != "fp32" and precision == "bf16" else torch.float32


def hold(
    llm: nn.Module, weights: "LlmWeights", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Freeze an LLM, as `loading_dtype` read it, and hold the linear layers of its blocks in so many bits, in place.

    Embeddings, norms and the LM head keep their type.

    Args:
        device: on which layers are quantised, and stay where they are.
        dtype: in which the LLM computes, and all that is not quantised is held; default: as it was read.

    Raises ConfigError where bitsandbytes is needed and not installed.
    """
    llm.requires_grad_(False)
    if weights in ("int8", "nf4"):
        for parent, name, linear in _linears(llm):
            setattr(parent, name, _quantised(linear, weights, device, dtype or linear.weight.dtype))
        llm.is_loaded_in_4bit = weights == "nf4"  # type: ignore[assignment]  # peft has a layer of its own for that
    if dtype is not None:
        for parameter in llm.parameters():  # and no buffer: rotary frequencies and the scales of int8 stay in fp32
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def release(llm: nn.Module) -> None:
    """Undo `hold`, in place: every weight is fp32, with the value that was held."""
    for parent, name, linear in _linears(llm):
        if is_quantised(linear.weight):
            values = linear.values(torch.float32) if isinstance(linear, Int8Linear) else _of_nf4(linear.weight)
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(values.float().cpu(), requires_grad=False)
            plain.bias = linear.bias
            setattr(parent, name, plain)
    llm.is_loaded_in_4bit = False  # type: ignore[assignment]
    nn.Module.to(llm, torch.float32)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held in 8 or 4 bits."""
    return hasattr(weight, "quant_state") or weight.dtype == torch.int8


def element_count(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: NF4 packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _linears(llm: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of the linear layers in the LLM's blocks: all but the LM head."""
    head = llm.get_output_embeddings()  # type: ignore[operator]
    for path, module in [*llm.named_modules()]:
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, name = path.rpartition(".")
            yield llm.get_submodule(parent), name, module


def _quantised(linear: nn.Linear, weights: "LlmWeights", device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    bnb = _bitsandbytes()
    if weights == "int8":
        return Int8Linear(linear, *bnb.functional.int8_vectorwise_quant(linear.weight.data.to(device).half())[:2])
    shape, values = (linear.in_features, linear.out_features), linear.weight.data.to(dtype)
    held: Any = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    held.weight = bnb.nn.Params4bit(
        values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=held
    )
    held.bias = linear.bias
    return held.to(device)  # this is when bitsandbytes quantises


def _of_nf4(weight: Any) -> Tensor:
    return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight is int8 with one scale for each output.

    Args:
        like: the layer that it stands for. weight: int8 [outputs, inputs]. largest: [outputs], what 127 stands for.
    """

    scale: Tensor

    def __init__(self, like: nn.Linear, weight: Tensor, largest: Tensor) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = like.bias
        self.register_buffer("scale", largest.float()[:, None] / 127)  # [outputs, 1]

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the weight stands for, [outputs, inputs]."""
        return (self.weight * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = _ThroughInt8.apply(x, self)
        return out if self.bias is None else out + self.bias


class _ThroughInt8(torch.autograd.Function):
    """x W^T and its gradient for x; the values of W exist only while they are multiplied with, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.values(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return (grad @ ctx.layer.values(grad.dtype)).to(ctx.dtype), None


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("an LLM in int8 or 4 bits needs an extra: pip install 'llama3v[lora]'") from error
    return bitsandbytes
