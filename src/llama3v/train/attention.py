"""Attention of packed rows: block-diagonal and causal, in the form that each kernel takes.

    sdpa        a dense mask [rows, 1, length, length]: every device, but the kernel computes what the mask then hides
    packed_flex PyTorch's FlexAttention with a block mask: blocks of 128 x 128 in which nobody looks at anybody are never
                computed, so the work grows with the samples' lengths squared and not with the row's
    eager       the dense mask, added

`choose_attention` takes FlexAttention where it can run and, on this very device, agrees with sdpa.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama3v.errors import ConfigError
from llama3v.train.batches import attention_mask

if TYPE_CHECKING:
    from llama3v.config import Attention  # it needs tyro, which a training step does not

BLOCK = 128  # side of a block of the mask; FlexAttention's own default
FLEX = "packed_flex"  # the name under which transformers finds `_flex_attention`
SMALLEST_HEAD = 16  # channels of a head below which FlexAttention's kernels do not run
AGREEMENT = 0.05  # largest difference from sdpa relative to the largest value, in bf16 (8 bits: 0.4% each rounding)


def mask_for(implementation: str, segments: Tensor, dtype: torch.dtype) -> Any:
    """What an LLM with this attention implementation takes as `attention_mask`, for rows of these segments.

    Args:
        segments: [rows, length], 1, 2, ... per sample of a row, one beside the other; 0 is padding, at the end.
        dtype: of the embeddings.
    """
    if implementation == FLEX:
        return block_mask(segments)
    mask = attention_mask(segments)
    if implementation == "eager":  # adds its mask, where the others select by it
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


def block_mask(segments: Tensor) -> Any:
    """The same as a BlockMask, from where samples begin: nothing of the size [length, length] is ever made.

    A block of queries needs the blocks of keys from the beginning of its first sample up to its own. Of these, those
    are whole that lie before the diagonal and within one sample with all of its queries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = segments.shape[1]
    blocks = -(-length // BLOCK)
    places = torch.arange(length, device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(begins, places, 0).cummax(dim=1).values  # [rows, length], where a token's sample begins
    first = torch.arange(blocks, device=segments.device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=length - 1)
    keys = torch.arange(blocks, device=segments.device)
    queries = keys[:, None]
    needed = (keys >= (start[:, first] // BLOCK)[:, :, None]) & (keys <= queries)  # [rows, blocks, blocks]
    # whole: even the last query's sample began before the block of keys
    whole = needed & (keys < queries) & (start[:, last][:, :, None] <= first)

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (start[row, query] <= key)

    return BlockMask.from_kv_blocks(
        *_listed(needed & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, queries, keys] -> how many [rows, 1, queries], and which, those first [rows, 1, queries, keys]."""
    indices = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[:, None], indices.int()[:, None].contiguous()


def _flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [rows, heads, length, size] -> [rows, length, heads, size]. Keys may have fewer heads."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, positions made them fp32
    attended: Any = _kernel(query.device)(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2).contiguous(), None


_compiled: Any = None


def _kernel(device: torch.device) -> Any:
    """FlexAttention, compiled for a GPU; on a CPU its reference, which computes in full, forward only, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled
    if device.type != "cuda":
        return flex_attention
    if _compiled is None:
        _compiled = torch.compile(flex_attention)
    return _compiled


def register() -> None:
    """Make `packed_flex` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, _flex_attention)


def choose_attention(llm: Any, device: torch.device, wanted: "Attention", *, bf16: bool) -> str:
    """Set the LLM's attention; returns in words what was chosen and why.

    Args:
        llm: transformers' model. wanted: as --attention.
        bf16: auto takes FlexAttention only then: in fp32 its kernels want more shared memory than some GPUs have.

    Raises ConfigError where FlexAttention is asked for and cannot train.
    """
    config = llm.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if wanted == "sdpa" or (wanted == "auto" and (device.type != "cuda" or not bf16 or head < SMALLEST_HEAD)):
        return "sdpa"
    if device.type != "cuda":
        raise ConfigError(f"FlexAttention trains on CUDA devices only, this one is {device.type}; use --attention sdpa")
    register()
    if wanted == "auto":
        try:
            difference = disagreement(device, config.num_attention_heads, config.num_key_value_heads, head)
        except Exception as error:  # whatever a compiler or a driver raises; it is told, and sdpa computes the same
            words = [*str(error).strip().splitlines(), type(error).__name__]
            return f"sdpa (FlexAttention does not run here: {words[0][:120]})"
        if not difference <= AGREEMENT:
            return f"sdpa (FlexAttention is off by {difference:.2g} of the largest value on this device)"
    llm.set_attn_implementation(FLEX)
    return "FlexAttention" if wanted == "flex" else f"FlexAttention (checked here against sdpa: {difference:.1g} apart)"


def disagreement(device: torch.device, heads: int, key_heads: int, size: int) -> float:
    """Largest difference between FlexAttention and sdpa on small random rows, relative to the largest value.

    On a GPU in bf16, forward and backward; on a CPU in fp32 and forward only: there, FlexAttention has no way back.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    length = 2 * BLOCK + 72
    segments = torch.zeros(2, length, dtype=torch.int32, device=device)
    for number, end in enumerate((length - 40, 200, 90, 31)):
        segments[0, :end] = 4 - number
    segments[1] = 1

    def drawn(heads: int) -> Tensor:
        tensor = torch.randn((2, heads, length, size), device=device, generator=generator).to(dtype)
        return tensor.requires_grad_(on_gpu)

    query, key, value = drawn(heads), drawn(key_heads), drawn(key_heads)
    flex, _ = _flex_attention(nn.Identity(), query, key, value, block_mask(segments))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask(segments), enable_gqa=heads != key_heads
    ).transpose(1, 2)
    real = (segments > 0)[:, :, None, None]
    weight = torch.randn(dense.shape, device=device, generator=generator).to(dtype) * real
    results = []
    for output in (flex, dense):
        gradients = torch.autograd.grad((output * weight).sum(), (query, key, value)) if on_gpu else ()
        results.append([output * real, *gradients])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
