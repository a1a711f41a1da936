"""The model that a run starts with: a new one (stage 1) or a trained one (stage 2), its LLM held and adapted as asked."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llama3v.config import PretrainConfig, SftConfig, TrainConfig
from llama3v.errors import ConfigError
from llama3v.model.frozen import hold, loading_dtype
from llama3v.model.llama3v import Llama3VForConditionalGeneration, build_model, load_model
from llama3v.model.lora import ADAPTER, LoraOptions, add_lora
from llama3v.model.on_base import Base, assemble, base_of, load_base, read_base, refers_to_base

Model = Llama3VForConditionalGeneration


def new_model(config: PretrainConfig) -> tuple[Model, PreTrainedTokenizerBase]:
    """A pretrained tower and a pretrained LLM, joined by a new projector; on the CPU."""
    model, tokenizer = build_model(
        config.vision,
        config.llm,
        cut=config.cut,
        scale_factor=config.scale_factor,
        projector_blocks=config.projector_blocks,
        projector_head=config.projector_head,
        max_tiles=config.max_tiles,
        prompt_format=config.prompt_format,
        seed=config.seed,
        llm_dtype=loading_dtype(config.llm_weights, config.precision),
    )
    if config.llm_weights != "fp32":
        _freeze(model, base_of(config.llm, "llm", model.llm), config)
    return model, tokenizer


def trained_model(config: SftConfig) -> tuple[Model, PreTrainedTokenizerBase]:
    """The model that stage 1, or an earlier stage 2, left; on the CPU.

    Raises:
        ConfigError: adapters are to be put on a model that has some already; a name in `lora_targets` matches nothing.
    """
    if config.lora_rank == 0 and config.llm_weights == "fp32":
        model, tokenizer = load_model(config.model)
    else:
        model, tokenizer, base = _with_base(config)
        _freeze(model, base, config)
    if config.max_tiles is not None:
        model.config.max_tiles = config.max_tiles
    return model, tokenizer


def _with_base(config: SftConfig) -> tuple[Model, PreTrainedTokenizerBase, Base]:
    """A trained model with its LLM as its source has it, whatever it was held in when the rest was trained."""
    dtype, directory = loading_dtype(config.llm_weights, config.precision), Path(config.model)
    if not refers_to_base(directory):
        model, tokenizer = load_model(config.model, llm_dtype=dtype)
        return model, tokenizer, base_of(config.model, "model", model.llm)
    if (directory / ADAPTER).is_dir():
        raise ConfigError(
            f"{directory} has LoRA adapters already, and its LLM is frozen again here; make them part of it first: "
            f"llama3v merge {directory} --out {directory}-merged"
        )
    base = read_base(directory)
    model, tokenizer = assemble(directory, load_base(directory, base, dtype))
    return model, tokenizer, base


def _freeze(model: Model, base: Base, config: TrainConfig) -> None:
    """Hold the LLM as asked, put adapters into it where asked, and let the model refer to where it came from."""
    lora = lora_options(config)
    hold(model.llm, config.llm_weights, "cuda" if torch.cuda.is_available() else "cpu")
    if lora is not None:
        add_lora(model.llm, lora, config.seed)
    dtype = loading_dtype(config.llm_weights, config.precision)
    model.base = replace(base, weights=config.llm_weights, dtype=str(dtype).removeprefix("torch."), lora=lora)


def lora_options(config: TrainConfig) -> LoraOptions | None:
    """The adapters that a run asks for, if it does."""
    if not isinstance(config, SftConfig) or not config.lora_rank:
        return None
    alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return LoraOptions(config.lora_rank, alpha, config.lora_dropout, config.lora_targets)
