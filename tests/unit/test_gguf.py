"""A GGUF file is an LLM like any other: its weights, its tokenizer, and a model that can be trained and saved."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama3v.errors import CheckpointError
from llama3v.model.llama3v import build_model, load_llm, load_model, save_model

gguf = pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
HEADS, KV_HEADS = 4, 2


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels, transformers channels half a head apart: rows of q and k are reordered."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """What llama.cpp's converter writes for a Llama in F32 with a byte-level BPE."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    content = tokenizer.backend_tokenizer
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token.content for token in content.get_added_tokens_decoder().values()}
    merges = [" ".join(pair) for pair in merges_of(content)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate"}
    parts |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    weights = model.state_dict()
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = permuted(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merges_of(backend) -> list[list[str]]:
    import json

    return json.loads(backend.to_str())["model"]["merges"]


@pytest.fixture(scope="module")
def llm(tiny_tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(llm, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llm, tiny_tokenizer)
    return path


@torch.no_grad()
def test_a_gguf_file_gives_the_logits_and_ids_of_the_model_it_was_made_of(llm, gguf_file, tiny_tokenizer) -> None:
    loaded, tokenizer = load_llm(str(gguf_file))
    ids = torch.tensor([tiny_tokenizer.encode("<|begin_of_text|>What is on the table?", add_special_tokens=False)])
    torch.testing.assert_close(loaded(ids).logits, llm(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.encode("What is it?", add_special_tokens=False) == tiny_tokenizer.encode("What is it?")


def test_a_model_with_a_gguf_llm_can_be_trained_and_saved(gguf_file, tiny_vision_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = build_model(str(tiny_vision_dir), str(gguf_file), prompt_format="llama3")
    save_model(model, tokenizer, tmp_path / "model")
    again, _ = load_model(tmp_path / "model")
    ids = torch.tensor([[0, 5, model.config.image_token_id, 7]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    model.train()
    loss = model(input_ids=ids, pixel_values=pixels, labels=ids.masked_fill(ids >= 320, -100)).loss
    loss.backward()
    assert model.llm.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("share", [0.6, 0.01, 0])
def test_a_gguf_llm_that_is_cut_short_is_one_line(gguf_file, tmp_path: Path, share: float) -> None:
    data = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read .* damaged, cut short") as caught:
        load_llm(str(tmp_path / "cut.gguf"))
    assert "\n" not in str(caught.value)
