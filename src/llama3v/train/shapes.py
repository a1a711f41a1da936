"""A training pass at its real shapes on the meta device: nothing is computed and no memory taken, but every tensor that
the backward pass would need is met and counted.

Products run in bf16 where autocast would run them so, and attention is counted as its fused kernels keep it: queries,
keys, values, output, one number per query and head, and the mask as numbers, but no matrix of attention per head.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.batches import attention_mask
from llama3v.train.loss import supervised_loss

VISION, LAYERS, REST = "projector and vision top", "LLM layers", "LLM, the rest"


@dataclass
class Kept:
    """Bytes that one pass keeps for its backward pass, by part; weights that are kept anyway are not among them.

    Attributes:
        copies: of weights, in the precision of the products.
        layer_inputs: of all LLM layers; what activation recompute keeps instead of all of `LAYERS`.
    """

    parts: dict[str, int] = field(default_factory=lambda: {VISION: 0, LAYERS: 0, REST: 0})
    copies: int = 0
    layer_inputs: int = 0

    def activations(self, *, layers: int, recompute: bool) -> dict[str, int]:
        """Bytes by part; under `recompute` one layer's own are there at a time, beside all their inputs."""
        if not recompute:
            return self.parts
        return self.parts | {LAYERS: self.layer_inputs + self.parts[LAYERS] // layers}


def run_on_meta(
    model: Llama3VForConditionalGeneration, *, rows: int, length: int, tiles: int, supervised: int, bf16: bool
) -> Kept:
    """Forward and backward of one pass with so many rows, tokens a row, tiles and supervised tokens.

    Args:
        model: on the meta device, with what trains marked.

    Raises whatever does not fit together: that is what a dry run is for.
    """
    kept = Kept()
    with torch.device("meta"):
        ids, positions = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
        segments = torch.ones(rows, length, dtype=torch.int32)
        patches = torch.zeros(tiles, model.vision.grid_side**2, model.vision.width, dtype=torch.bfloat16)
        places, targets = torch.zeros(supervised, dtype=torch.long), torch.zeros(supervised, dtype=torch.long)
    with _AsAutocast(bf16) as products, _counted(model, kept, products) as part:
        part(VISION)
        visual = model.visual_tokens(patches)  # [tiles, tokens_per_tile, hidden]
        part(REST)
        embeddings = model.get_input_embeddings()(ids)  # [rows, length, hidden]
        slots = torch.zeros(rows, length, 1, dtype=torch.bool, device="meta")
        embeddings = embeddings.masked_scatter(slots, visual.to(embeddings.dtype))
        hidden = model.llm.model(
            inputs_embeds=embeddings, attention_mask=attention_mask(segments), position_ids=positions, use_cache=False
        ).last_hidden_state
        head: Any = model.get_output_embeddings()
        loss = supervised_loss(hidden.flatten(0, 1)[places], targets, head.weight.to(hidden.dtype), supervised)
    loss.backward()
    for parameter in model.parameters():
        wanted, found = parameter.requires_grad, parameter.grad is not None
        assert wanted == found, "what trains gets a gradient, and nothing else does"
        parameter.grad = None
    return kept


class _AsAutocast(TorchFunctionMode):
    """Casts the operands of products to bf16, as autocast does on a device that computes (it knows no meta device)."""

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.copies: dict[int, Tensor] = {}  # id of a weight -> its bf16 copy, of which autocast keeps one, too

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*(self._cast(x) for x in args[:3]), kwargs.get("attn_mask"))
        if self.bf16 and function in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            args = tuple(self._cast(x) for x in args)
        return function(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        if not (self.bf16 and isinstance(x, Tensor) and x.dtype == torch.float32):
            return x
        if not isinstance(x, nn.Parameter):
            return x.bfloat16()
        if id(x) not in self.copies:
            self.copies[id(x)] = x.bfloat16()
        return self.copies[id(x)]


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: [rows, heads, length, head size] x 3 -> the same."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(queries)
        bias = [] if mask is None else [mask.to(out.dtype)]  # every layer makes its own of the mask of all
        ctx.save_for_backward(queries, keys, values, out, out.new_empty(out.shape[:-1], dtype=torch.float32), *bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None)


@contextmanager
def _counted(model: Llama3VForConditionalGeneration, kept: Kept, products: _AsAutocast) -> Iterator[Any]:
    """While entered, whatever autograd saves is counted once, for the part that was named last or the layer it is in."""
    seen: dict[int, Tensor] = {_place(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    now = [REST]

    def pack(tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in seen:
            seen[place] = tensor  # held, so that no other tensor takes its place
            if any(_place(copy) == place for copy in products.copies.values()):
                kept.copies += tensor.untyped_storage().nbytes()
            else:
                kept.parts[now[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kept.layer_inputs += hidden.nbytes
        now.append(LAYERS)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        now.pop()

    def part(name: str) -> None:
        now[0] = name

    layers: Any = model.llm.model.layers
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    trains = any(parameter.requires_grad for parameter in model.parameters())
    hooks: Any = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor) if trains else nullcontext()
    try:
        with hooks:
            yield part
    finally:
        for handle in handles:
            handle.remove()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
