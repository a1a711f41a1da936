"""A model that refers to its base: where the LLM stands still, its weights are not written a second time.

    runs/stage2/
      config.json, tokenizer.json, ...   as of every model
      base.json                          where the frozen LLM lies, and how it was held while the rest was trained
      parts.safetensors                  all the rest: vision tower and projector
      adapter/                           LoRA, in peft's form; absent where only the projector trained

So LoRA and projector never come apart, and every verb takes the directory as it takes any model. The LLM is found again
relative to the directory, or at its old place, or on the hub; a fingerprint of its weights tells another one.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llama3v.errors import CheckpointError
from llama3v.model.frozen import hold, is_quantised, release
from llama3v.model.lora import ADAPTER, LoraOptions, has_lora, load_lora, merge_lora, save_lora

if TYPE_CHECKING:
    from llama3v.config import LlmWeights
    from llama3v.model.llama3v import Llama3VForConditionalGeneration

BASE, PARTS = "base.json", "parts.safetensors"
FORMAT = 1
SAMPLED = 4096
"""Numbers of each tensor that an LLM's fingerprint looks at."""


@dataclass(frozen=True)
class Base:
    """The frozen LLM of a model.

    Attributes:
        source: absolute path or hub name of what it is read from.
        kind: llm: that is an LLM alone. model: a Llama 3-V, and its LLM is meant.
        fingerprint: see `llm_fingerprint`.
        weights, dtype: how it is held while the rest trains; see model/frozen.py.
        lora: adapters that train in it.
    """

    source: str
    kind: Literal["llm", "model"]
    fingerprint: str
    weights: "LlmWeights" = "fp32"
    dtype: str = "float32"
    lora: LoraOptions | None = None


def base_of(name: str, kind: Literal["llm", "model"], llm: nn.Module) -> Base:
    """The base that an LLM is which was read from there, before it is changed in any way."""
    source = str(Path(name).resolve()) if Path(name).exists() else name
    return Base(source, kind, llm_fingerprint(llm))


def llm_fingerprint(llm: nn.Module) -> str:
    """Hash of all names and shapes, and of evenly spaced numbers of every tensor, rounded to bf16.

    It tells another LLM, or the same one trained further, in whatever precision both were read. It is not a checksum.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for name, parameter in llm.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to(torch.bfloat16).cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refers_to_base(directory: Path | str) -> bool:
    """Whether a model directory holds no LLM of its own."""
    return (Path(directory) / BASE).is_file()


def save_on_base(model: "Llama3VForConditionalGeneration", tokenizer: Any, directory: Path, base: Base) -> None:
    """Write everything but the frozen LLM into one directory."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    parts = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("llm.")
    }
    save_file(parts, directory / PARTS, metadata={"format": "pt"})
    if base.lora is not None:
        save_lora(model.llm, base.lora, base.source, directory)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    nearby = os.path.relpath(base.source, directory.resolve()) if Path(base.source).is_absolute() else None
    content = {"format": FORMAT, **asdict(replace(base, lora=None)), "relative": nearby}
    del content["lora"]  # adapter/ says it
    (directory / BASE).write_text(json.dumps(content, indent=1) + "\n")


def read_base(directory: Path | str) -> Base:
    """What a directory refers to. Raises CheckpointError where that cannot be read."""
    path = Path(directory) / BASE
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise CheckpointError(f"{path}: this program reads format {FORMAT}; update llama3v")
        nearby = content.pop("relative")
        base = Base(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if nearby is not None and (found := (Path(directory) / nearby).resolve()).exists():
        return replace(base, source=str(found))
    return base


def load_base(directory: Path | str, base: Base, dtype: torch.dtype) -> nn.Module:
    """The frozen LLM that a directory refers to, as its source has it. Raises CheckpointError where it is not there."""
    from llama3v.model.llama3v import load_model
    from llama3v.model.llm import load_llm

    if Path(base.source).is_absolute() and not Path(base.source).exists():
        raise CheckpointError(
            f"{directory} refers to the LLM in {base.source}, which is not there; put it there, or name its place as "
            f"source in {Path(directory) / BASE}"
        )
    if base.kind == "llm":
        llm: nn.Module = load_llm(base.source, dtype)[0]
    else:
        llm = load_model(base.source, llm_dtype=dtype)[0].llm
    if (found := llm_fingerprint(llm)) != base.fingerprint:
        raise CheckpointError(
            f"{directory} was trained on the LLM in {base.source}, but another one is there now (fingerprint {found}, "
            f"expected {base.fingerprint}); bring the old one back"
        )
    return llm


def load_on_base(directory: Path | str, *, merge: bool = True) -> tuple["Llama3VForConditionalGeneration", Any]:
    """A model that refers to its base, whole and in fp32, with the LLM's values as they were held in training.

    Args:
        merge: adapters become part of the weights; else they are left beside them.
    """
    base = read_base(directory)
    llm = load_base(directory, base, getattr(torch, base.dtype))
    hold(llm, base.weights, "cuda" if torch.cuda.is_available() else "cpu")
    release(llm)
    if (Path(directory) / ADAPTER).is_dir():
        load_lora(llm, Path(directory))
        if merge:
            merge_lora(llm)
    return assemble(directory, llm)


def assemble(directory: Path | str, llm: nn.Module) -> tuple["Llama3VForConditionalGeneration", Any]:
    """Join the parts of a directory with an LLM; in evaluation mode."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import GenerationConfig

    from llama3v.model.llama3v import Llama3VConfig, Llama3VForConditionalGeneration
    from llama3v.model.llm import load_tokenizer
    from llama3v.model.vision import make_tower

    try:
        config = Llama3VConfig.from_pretrained(directory)
        tensors = load_file(Path(directory) / PARTS)
        tokenizer = load_tokenizer(directory)
        with torch.device("meta"):
            model = Llama3VForConditionalGeneration(config)
        model.llm, model.vision = llm, make_tower(config.vision_config)
        model.projector.to_empty(device="cpu")
        for name in ("vision", "projector"):
            getattr(model, name).load_state_dict(_below(tensors, name))
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory}: its parts cannot be loaded ({reason}); they are damaged") from error
    return model.eval(), tokenizer


def is_on_base(model: "Llama3VForConditionalGeneration") -> bool:
    """Whether what this model's LLM is in memory cannot be written as a plain LLM: adapters, or fewer bits than 32."""
    held = (is_quantised(parameter) or parameter.dtype != torch.float32 for parameter in model.llm.parameters())
    return has_lora(model.llm) or any(held)


def _below(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
