"""Write a Llama 3-V as a pair of GGUF files, as llama.cpp and what is built on it (Ollama) read them.

model.gguf       the LLM with its tokenizer and chat template (this file)
mmproj.gguf      vision tower, projector blocks and projector as one Idefics3 tower (exporters/mmproj.py)
tokenizer.json   for this package's own engine, which renders prompts itself; with tokenizer_config.json
vision.xml, .bin or vision.onnx: tower and projector for OpenVINO or ONNX Runtime (exporters/vision_files.py)
Modelfile        for `ollama create`
README.md        how to run it; exporters/card.py completes it
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.engines.vision_file import FILES, Runtime
from llama3v.errors import CheckpointError, ConfigError
from llama3v.exporters import licence, quantise
from llama3v.exporters.gguf_texts import modelfile, readme
from llama3v.exporters.hf import FRAMING_TOKENS, foldable_tower, write_tokenizer
from llama3v.exporters.mmproj import write_mmproj
from llama3v.exporters.texts import chat_template
from llama3v.exporters.vision_files import digest_of, write_vision_file
from llama3v.model.fold import grow_rows
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.prompt import IMAGE_TOKEN, Renderer

LLM_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
# Stock mtmd writes these around an image of an Idefics3 tower; as reserved tokens they are one id each, not letters.
NEW_TOKENS = (IMAGE_TOKEN, *FRAMING_TOKENS["idefics3"])

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LLAMA_3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_gguf(
    model: Llama3VForConditionalGeneration,
    tokenizer: Any,
    directory: Path,
    *,
    weights: str,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Write `model` into the existing, empty `directory` and return what the summary should say.

    Args:
        tokenizer: the LLM's fast tokenizer.
        weights: type of the LLM's matrices, a key of `quantise.TYPES`.
        runtime: whose vision file is added (vision_files.py), if any.

    Raises:
        CheckpointError: the model, its LLM or its tokenizer has no GGUF form here.
        ConfigError: the Python package gguf is not installed.
    """
    gguf = require_gguf_package()
    tower, config = foldable_tower(model), model.config
    renderer = Renderer(tokenizer, config.prompt_format, model.tokens_per_tile, config.image_token_id)
    write_tokenizer(tokenizer, config, NEW_TOKENS, renderer, directory)
    writer = gguf.GGUFWriter(directory / LLM_FILE, "llama")
    writer.add_type("model")
    writer.add_name("Llama 3-V")
    writer.add_file_type(quantise.FILE_TYPES[weights])
    writer.add_quantization_version(2)
    _write_shape(writer, config.text_config)
    _write_vocabulary(gguf, writer, tokenizer, renderer, directory)
    writer.add_chat_template(chat_template(config.prompt_format))
    tensors = 0
    for name, values, kind in _tensors(model, weights):
        writer.add_tensor(name, quantise.encoded(gguf, values, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        tensors += 1
    finish(writer)
    half = weights != "f32"
    tensors += write_mmproj(gguf, model, tower, directory / VISION_FILE, half=half, digest=digest_of(model))
    added = write_vision_file(model, tower, directory, runtime=runtime, half=half) if runtime is not None else 0
    base = licence.base_of(config.text_config, tokenizer)
    stops = [renderer.name_of(stop) for stop in renderer.stop_ids]
    (directory / "Modelfile").write_text(modelfile(config.prompt_format, stops, base))
    (directory / "README.md").write_text(readme(tower.tile_size, model.tokens_per_tile, licence.built_with(base)))
    return {
        "format": "gguf",
        "form": "janus_pro" if config.scale_factor == 1 else "idefics3",
        "weights": weights,
        "tensors": tensors,
        "bytes": sum((directory / name).stat().st_size for name in (LLM_FILE, VISION_FILE)),
        "vision_file": FILES[runtime] if runtime is not None else None,
        "vision_file_bytes": added,
        "image_token_id": config.image_token_id,
        "tokens_per_tile": model.tokens_per_tile,
        "base": base,
    }


def require_gguf_package() -> Any:
    """The module gguf; ConfigError, naming the extra, where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("writing GGUF needs an extra: pip install 'llama3v[gguf,llamacpp]'") from error
    return gguf


def finish(writer: Any) -> None:
    """Write what a GGUFWriter has been given, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, text: Any) -> None:
    if text.model_type != "llama":
        raise CheckpointError(
            f"expected an LLM of the type llama, found {text.model_type!r}, whose GGUF form is not written here; use --format hf"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise CheckpointError(
            f"expected rotary positions of the type default or llama3, found {rope['rope_type']!r}; use --format hf"
        )
    writer.add_vocab_size(text.vocab_size + len(NEW_TOKENS))
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)


def _write_vocabulary(gguf: Any, writer: Any, tokenizer: Any, renderer: Renderer, directory: Path) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        raise CheckpointError(
            "expected a byte-level BPE tokenizer (Llama 3, SmolLM ...), found another; use --format hf"
        )
    ids = dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    names = sorted(ids, key=ids.__getitem__)
    if [ids[name] for name in names] != list(range(len(names))):
        raise CheckpointError("the tokenizer's ids have gaps or doubles, so this LLM has no GGUF form here")
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pattern_name(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]))
    writer.add_token_list(names)
    writer.add_token_types([kinds[special.get(number)] for number in range(len(names))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    begin = tokenizer.bos_token_id if renderer.begin_id is None else renderer.begin_id
    if begin is not None:
        writer.add_bos_token_id(begin)
    writer.add_eos_token_id(renderer.stop_ids[0])
    writer.add_eot_token_id(renderer.stop_ids[0])
    writer.add_pad_token_id(renderer.stop_ids[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    # Ollama's templates leave the begin token to this. Where it is set, llama.cpp takes it off what the chat template writes
    writer.add_add_bos_token(renderer.begin_id is not None)


def _pattern_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a tokenizer splits text before it merges; it has no other way to say it."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": "none"}])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == _LLAMA_3_PATTERN:
        return "llama-bpe"
    raise CheckpointError(
        f"expected a tokenizer that splits text as Llama 3, SmolLM or GPT-2 do, found {' + '.join(kinds)}; use --format hf"
    )


def _tensors(model: Llama3VForConditionalGeneration, weights: str) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, float32 values, ggml type) of every tensor of the LLM."""
    text = model.config.text_config
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    tied = text.tie_word_embeddings
    for name, tensor in model.llm.state_dict().items():
        if name == _HEAD and tied:
            continue
        if name in (_EMBEDDING, _HEAD):
            tensor = grow_rows(tensor, len(NEW_TOKENS))
        theirs, part = _gguf_name(name)
        if part in heads:
            tensor = _neighbours_first(tensor, heads[part])
        kind = quantise.type_of(weights, theirs, tuple(tensor.shape), layers=text.num_hidden_layers, tied=tied)
        yield theirs, tensor.float().contiguous().numpy(), kind
    factors = _rope_factors(text)
    if factors is not None:
        yield "rope_freqs.weight", factors, "F32"


def _gguf_name(name: str) -> tuple[str, str]:
    """(llama.cpp's name, the part of a layer or "") of a parameter of transformers' Llama."""
    outside = {_EMBEDDING: "token_embd.weight", _HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name], ""
    if name.startswith("model.layers."):
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        if part in _NAMES:
            return f"blk.{layer}.{_NAMES[part]}.{kind}", _NAMES[part]
    raise CheckpointError(f"the LLM's parameter {name} has no place in a GGUF file of a Llama; use --format hf")


def _neighbours_first(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates channels 2i and 2i + 1 of a head together, transformers i and i + half: reorder the rows."""
    rows = tensor.shape[0]
    split = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])  # [heads, half, channel, ...]
    return split.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(text: Any) -> np.ndarray | None:
    """What each rotary frequency is divided by in Llama 3.1 and later [head / 2], or None.

    Source: Meta, llama-models, models/llama3/model.py, apply_scaling.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # within the first context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float().numpy()
