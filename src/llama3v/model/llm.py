"""The language model and its tokenizer: from a hub name, a directory or a GGUF file."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llama3v.errors import CheckpointError
from llama3v.model.vision import load_stock, refuse_missing


def load_llm(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama-family LLM and its tokenizer from a hub name, a directory or a GGUF file."""
    path = Path(name)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    try:
        model, missing = load_stock(AutoModelForCausalLM, name, dtype)
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"language model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    refuse_missing(name, missing)
    return model, tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or directory. Raises OSError where there is none, CheckpointError for a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except OSError:
        raise
    except Exception as error:  # the library's own errors are of no narrower class, whatever is wrong with the file
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{source}: the tokenizer cannot be read ({reason}); it is damaged or absent, fetch or write the model again"
        ) from error


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise CheckpointError(f"no GGUF file at {path}")
    try:
        source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise CheckpointError("reading GGUF needs an extra: pip install 'llama3v[gguf]'") from error
    except (OSError, ValueError, LookupError, struct.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} cannot be read ({reason}): it is damaged, cut short, or a kind of LLM that transformers does not "
            "read out of GGUF; fetch it again, or give the LLM's directory"
        ) from error
    # transformers marks a model read from GGUF as quantised and then refuses to train it: move the weights to a clean one
    config = type(source.config)(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    return model, _without_strangers(tokenizer, config.vocab_size)


def _without_strangers(tokenizer: Any, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer without tokens past the LLM's vocabulary.

    transformers adds GPT-2's <|endoftext|> to every byte-level tokenizer that it reads from GGUF. Where the LLM has no
    such token (Llama 3), that takes the id that an image's tokens have.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    known = [token for token in content["added_tokens"] if token["id"] < vocabulary]
    if len(known) == len(content["added_tokens"]):
        return tokenizer
    strangers = {token["content"] for token in content["added_tokens"]} - {token["content"] for token in known}
    names = {role: token for role, token in tokenizer.special_tokens_map.items() if token not in strangers}
    backend = Tokenizer.from_str(json.dumps(content | {"added_tokens": known}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **names)
