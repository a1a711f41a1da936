"""One real step of a run's own verb on a scaled-down copy: the same parts, policy and options, a few numbers wide.

Layers, widths and data are small; patches, tiles, tokenizer, precision and what trains are the run's. It takes seconds,
and what would fail in the first minutes of the real run (a library that is missing, options that do not fit) fails here.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llama3v.config import PretrainConfig, SftConfig
from llama3v.model.llama3v import Llama3VConfig, Llama3VForConditionalGeneration, save_model

WIDTH, HEADS, MLP = 64, 4, 128
PICTURES = ((200, 200), (700, 350))  # pixels; the second is sliced, where the run slices


def one_real_step(
    config: PretrainConfig | SftConfig,
    shape: Llama3VConfig,
    tokenizer: PreTrainedTokenizerBase,
    run: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """The summary of one step in a temporary directory, which is gone afterwards.

    Args:
        shape: the real model's. run: `pretrain` or `sft`.
    """
    with TemporaryDirectory(prefix="llama3v-dry-run-") as name:
        directory = Path(name)
        model = _small_copy(shape)
        save_model(model, tokenizer, directory / "model")
        model.llm.save_pretrained(directory / "llm")
        tokenizer.save_pretrained(directory / "llm")
        small: Any = replace(
            config,
            **_models(config, directory),
            data=(str(_draw(directory / "pictures")),),
            mode="stream",
            cache=None,
            codec=None,
            ring=None,
            out=directory / "out",
            steps=1,
            rows_per_step=1,
            rows_per_pass=1,
            limit=None,
            validation=None,
            budget=None,
            recipe=None,
            dry_run=False,
        )
        with (directory / "log").open("w") as log:
            return run(small, console=Console(file=log))


def _models(config: PretrainConfig | SftConfig, directory: Path) -> dict[str, Any]:
    if isinstance(config, PretrainConfig):
        return {"vision": str(directory / "model"), "llm": str(directory / "llm")}
    return {"model": str(directory / "model")}


def _small_copy(shape: Llama3VConfig) -> Llama3VForConditionalGeneration:
    content = shape.to_dict()
    vision, text = content["vision_config"], content["text_config"]
    if vision["kind"] == "siglip":
        top = min(1, vision["depth"] - vision["cut"])
        vision |= {"width": WIDTH, "heads": HEADS, "mlp_size": MLP, "depth": 1 + top, "cut": 1}
    text |= {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": WIDTH // HEADS,
        "layer_types": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Llama3VForConditionalGeneration(
            Llama3VConfig(**{**content, "vision_config": vision, "text_config": text})
        )
        model.projector.initialise(0.02, torch.Generator().manual_seed(0))
    return model


def _draw(directory: Path) -> Path:
    """A LLaVA JSON of grey pictures."""
    from PIL import Image

    directory.mkdir()
    rows = []
    for number, size in enumerate(PICTURES):
        Image.new("RGB", size, (40 * number,) * 3).save(directory / f"{number}.png")
        turns = [("human", "<image>\nHow bright is it?"), ("gpt", f"It is {40 * number} of 255.")]
        conversations = [{"from": role, "value": text} for role, text in turns]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": conversations})
    path = directory / "data.json"
    path.write_text(json.dumps(rows))
    return path
