"""LoRA adapters in the LLM, through peft (arXiv 2106.09685): W x + alpha / rank * B A x, where A and B train and W stands still.

peft is met in this file only. Adapters are written in its own form, so that peft loads them, too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama3v.errors import CheckpointError, ConfigError

ADAPTER = "adapter"  # name of the directory, and peft's files in it:
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's, of an LLM's only adapter
_PREFIX = "base_model.model."  # that peft's files put before the names of an LLM's modules


@dataclass(frozen=True)
class LoraOptions:
    """What decides the shape of adapters: see the options `lora_*` of `SftConfig`."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def add_lora(llm: nn.Module, options: LoraOptions, seed: int = 0) -> None:
    """Put adapters beside the LLM's linear layers of the given names, in place. They start as nothing: B is zero.

    What was there is frozen; adapters are fp32 and train. The same seed gives the same A.

    Raises:
        ConfigError: a name that no linear layer of the LLM has; peft is not installed.
    """
    peft = _peft()
    _refuse_unmatched(llm, options.targets)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=sorted(options.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, llm, _NAME, low_cpu_mem_usage=_is_meta(llm))
    for name, parameter in llm.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # peft gives them the type of the frozen weight


def has_lora(llm: nn.Module) -> bool:
    """Whether adapters are in place."""
    return any(".lora_A." in name for name, _ in llm.named_parameters())


def save_lora(llm: nn.Module, options: LoraOptions, base: str, directory: Path) -> None:
    """Write `directory`/adapter, as peft does.

    Args:
        base: name of the base model, for peft's file.
    """
    from safetensors.torch import save_file

    target = directory / ADAPTER
    target.mkdir(parents=True, exist_ok=True)
    config = _peft().LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=sorted(options.targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {
        _PREFIX + name.replace(f".{_NAME}.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in llm.named_parameters()
        if ".lora_" in name
    }
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(target)


def load_lora(llm: nn.Module, directory: Path) -> LoraOptions:
    """Put the adapters of `directory`/adapter in place, with their weights.

    Raises CheckpointError where they are damaged, or do not belong to this LLM.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = directory / ADAPTER
    try:
        options = _options_of(json.loads((source / CONFIG).read_text()))
        tensors = load_file(source / WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the adapter in {source} cannot be read ({error})") from error
    try:
        add_lora(llm, options)
    except ConfigError as error:
        raise CheckpointError(f"the adapter in {source} does not belong to its base: {error}") from error
    fill_lora(llm, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, source)
    return options


def fill_lora(llm: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copy weights, by peft's names (without an adapter's name in them) or the LLM's, into adapters in place."""
    own = {name.replace(f".{_NAME}.", "."): p for name, p in llm.named_parameters() if ".lora_" in name}
    given = {name.replace(f".{_NAME}.", "."): tensor for name, tensor in tensors.items()}
    wrong = sorted(own.keys() ^ given.keys()) or [name for name in own if own[name].shape != given[name].shape]
    if wrong:
        raise CheckpointError(
            f"the adapter in {source} does not fit its base, e.g. {wrong[0]}; it is damaged, or the base is another one"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


@torch.no_grad()
def merge_lora(llm: nn.Module) -> None:
    """Add every adapter to the weight beside it and take it out, in place: what remains is a plain LLM.

    Raises CheckpointError where an adapter holds what is not a number.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [*llm.named_modules()]:
        if not isinstance(layer, LoraLayer):
            continue
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"the adapter of {name} holds NaN; use an earlier checkpoint") from error
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(llm, "peft_config"):
        del llm.peft_config


@contextmanager
def without_lora(llm: nn.Module) -> Iterator[None]:
    """The LLM as it was before: adapters have no part in what is computed inside."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in llm.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _options_of(config: dict[str, Any]) -> LoraOptions:
    return LoraOptions(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        targets=tuple(sorted(config["target_modules"])),
    )


def _is_meta(llm: nn.Module) -> bool:
    return next(llm.parameters()).is_meta  # adapters of a model without weights have none either


def _refuse_unmatched(llm: nn.Module, targets: tuple[str, ...]) -> None:
    names = {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    names.discard("lm_head")  # the loss runs it by its weight alone, past any adapter (train/loss.py)
    if unmatched := [target for target in targets if target not in names]:
        raise ConfigError(
            f"--lora-targets {unmatched[0]} matches no linear layer of this LLM; it has {', '.join(sorted(names))}"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs an extra: pip install 'llama3v[lora]'") from error
    return peft
