"""FlexAttention's block mask says what the dense mask says, and both kernels compute the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from llama3v.errors import ConfigError
from llama3v.train import attention
from llama3v.train.attention import block_mask, choose_attention, disagreement, mask_for
from llama3v.train.batches import attention_mask


@st.composite
def packed_rows(draw: st.DrawFn) -> torch.Tensor:
    """Segments of a few rows: samples beside one another, and padding at the end."""
    length = draw(st.integers(1, 90)) * 8
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        samples = draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
        row = [number for number, size in enumerate(samples, start=1) for _ in range(size)][:length]
        rows.append(row + [0] * (length - len(row)))
    return torch.tensor(rows, dtype=torch.int32)


@settings(deadline=None, max_examples=40)
@given(packed_rows())
def test_the_block_mask_is_the_one_that_pytorch_makes_of_the_dense_mask(segments: torch.Tensor) -> None:
    rows, length = segments.shape
    dense = attention_mask(segments)[:, 0]

    def allowed(row, head, query, key):  # type: ignore[no-untyped-def]
        return dense[row, query, key]

    theirs = create_block_mask(allowed, rows, None, length, length, device="cpu")
    ours = block_mask(segments)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        whole = length // 128 * 128 == length
        if whole or "full" not in name:  # blocks beyond the row's end: PyTorch calls none of them full
            assert torch.equal(getattr(ours, name).squeeze(1), getattr(theirs, name).squeeze(1)) or not whole, name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    row, query, key = torch.meshgrid(*(torch.arange(size) for size in (rows, length, length)), indexing="ij")
    assert torch.equal(ours.mask_mod(row, 0, query, key), dense)


@settings(deadline=None, max_examples=40)
@given(packed_rows())
def test_blocks_that_are_called_whole_are_whole(segments: torch.Tensor) -> None:
    dense, mask = attention_mask(segments)[:, 0], block_mask(segments)
    counts, indices = mask.full_kv_num_blocks[:, 0], mask.full_kv_indices[:, 0]
    for row in range(counts.shape[0]):
        for query in range(counts.shape[1]):
            for key in indices[row, query, : counts[row, query]].tolist():
                assert dense[row, query * 128 : query * 128 + 128, key * 128 : key * 128 + 128].all()


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_flex_attention_and_sdpa_agree(heads: int, key_heads: int) -> None:
    """On a CPU the kernel is FlexAttention's reference, forward; a GPU's is checked by every run (`choose_attention`)."""
    assert disagreement(torch.device("cpu"), heads, key_heads, 16) < 1e-4


@pytest.mark.slow  # compiles kernels, and needs a GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's way back runs on CUDA only")
def test_flex_attention_and_sdpa_agree_forward_and_backward_on_a_gpu() -> None:
    assert disagreement(torch.device("cuda"), 32, 8, 128) < attention.AGREEMENT


@torch.no_grad()
def test_packed_logits_are_the_same_through_flex_attention(tiny_model_dir) -> None:  # type: ignore[no-untyped-def]
    from llama3v.model.llama3v import load_model

    model, _ = load_model(tiny_model_dir)
    segments = torch.zeros(2, 208, dtype=torch.int32)
    segments[0, :150], segments[0, 60:150], segments[1] = 1, 2, 1
    positions = torch.cat([torch.arange(60), torch.arange(90), torch.arange(58)]).expand(2, -1).clone()
    positions[1] = torch.arange(208)
    embeddings = torch.randn(2, 208, 32, generator=torch.Generator().manual_seed(0))
    found = []
    attention.register()
    for name in ("sdpa", "eager", attention.FLEX):
        model.llm.set_attn_implementation(name)
        mask = mask_for(model.llm.config._attn_implementation, segments, embeddings.dtype)
        hidden = model.llm.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        found.append(hidden[segments > 0])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=2e-4, rtol=1e-4)


def test_a_cpu_keeps_sdpa_and_a_kernel_that_is_off_is_not_taken(tiny_model_dir, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from llama3v.model.llama3v import load_model

    llm = load_model(tiny_model_dir)[0].llm
    llm.config.head_dim = 64
    assert choose_attention(llm, torch.device("cpu"), "auto", bf16=True) == "sdpa"
    with pytest.raises(ConfigError, match="use --attention sdpa"):
        choose_attention(llm, torch.device("cpu"), "flex", bf16=True)
    monkeypatch.setattr(attention, "disagreement", lambda *arguments: float("nan"))
    assert "off by nan" in choose_attention(llm, torch.device("cuda"), "auto", bf16=True)

    def fails(*arguments: object) -> float:
        raise RuntimeError("no Triton\nhere")

    monkeypatch.setattr(attention, "disagreement", fails)
    assert choose_attention(llm, torch.device("cuda"), "auto", bf16=True) == (
        "sdpa (FlexAttention does not run here: no Triton)"
    )
    assert llm.config._attn_implementation == "sdpa"
