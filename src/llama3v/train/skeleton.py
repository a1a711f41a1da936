"""The model of a run without its weights: every shape, on the meta device, from configuration files alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from llama3v.config import PretrainConfig, SftConfig
from llama3v.errors import CheckpointError
from llama3v.model.frozen import loading_dtype
from llama3v.model.llama3v import Llama3VConfig, Llama3VForConditionalGeneration
from llama3v.model.lora import add_lora
from llama3v.model.prompt import detect_format
from llama3v.model.vision import tower_geometry
from llama3v.train.start import lora_options


def skeleton(
    config: PretrainConfig | SftConfig,
) -> tuple[Llama3VForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model that the run would train, with its adapters, and its tokenizer.

    Raises CheckpointError where a configuration or tokenizer is not to be had.
    """
    shape, tokenizer = _new(config) if isinstance(config, PretrainConfig) else _trained(config)
    with torch.device("meta"):
        model = Llama3VForConditionalGeneration(shape)
    torch.nn.Module.to(model.llm, loading_dtype(config.llm_weights, config.precision))
    if config.llm_weights != "fp32":
        model.llm.requires_grad_(False)
    if (lora := lora_options(config)) is not None:
        add_lora(model.llm, lora, config.seed)
    return model, tokenizer


def _new(config: PretrainConfig) -> tuple[Llama3VConfig, Any]:
    text, tokenizer = _read(config.llm)
    shape = Llama3VConfig(
        vision_config=tower_geometry(config.vision, cut=config.cut),
        text_config=text,
        scale_factor=config.scale_factor,
        projector_blocks=config.projector_blocks,
        projector_head=config.projector_head,
        max_tiles=config.max_tiles,
        prompt_format=detect_format(tokenizer) if config.prompt_format == "auto" else config.prompt_format,
    )
    return shape, tokenizer


def _trained(config: SftConfig) -> tuple[Llama3VConfig, Any]:
    shape, tokenizer = _read(config.model)
    if not isinstance(shape, Llama3VConfig):
        raise CheckpointError(f"{config.model} holds a {shape.model_type!r} model, not a Llama 3-V")
    if config.max_tiles is not None:
        shape.max_tiles = config.max_tiles
    return shape, tokenizer


def _read(name: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a hub name, a directory or a GGUF file."""
    path = Path(name)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = str(path.parent) if options else name
    try:
        shape = AutoConfig.from_pretrained(place, **options)
        return shape, AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the configuration of {name} cannot be read: {str(error).splitlines()[0]}") from error
