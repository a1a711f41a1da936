"""What an ablation changes, in words: "r=1", "mlp", "cut=20+policy=seed"."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from llama3v.config import Codec, EncodeConfig, Policy
from llama3v.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """Options that differ from the base's.

    Attributes:
        pretrain, sft, both: of stage 1 alone, stage 2 alone, both. stage_1: whether there is one.
    """

    name: str
    pretrain: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    stage_1: bool = True

    @property
    def first(self) -> dict[str, Any]:
        """What differs in stage 1."""
        return self.pretrain | self.both

    @property
    def second(self) -> dict[str, Any]:
        """What differs in stage 2, beside the model it begins with."""
        return self.sft | self.both


BASE = Variant("base")

_Change = tuple[str, dict[str, Any]]  # a part of Variant, and what it holds


def _number(part: str, option: str) -> Callable[[str], _Change]:
    def change(value: str) -> _Change:
        if not value.isdecimal():
            raise ValueError("a whole number")
        return part, {option: int(value)}

    return change


def _choice(part: str, option: str, choices: tuple[str, ...]) -> Callable[[str], _Change]:
    def change(value: str) -> _Change:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return part, {option: value}

    return change


_VALUED: dict[str, Callable[[str], _Change]] = {
    "blocks": _number("pretrain", "projector_blocks"),
    "r": _number("pretrain", "scale_factor"),
    "cut": _number("pretrain", "cut"),
    "max-tiles": _number("both", "max_tiles"),
    "codec": _choice("both", "codec", get_args(Codec)),
    "policy": _choice("sft", "policy", get_args(Policy)),
}
_PLAIN: dict[str, _Change] = {
    "linear": ("pretrain", {"projector_blocks": 0}),
    "mlp": ("pretrain", {"projector_blocks": 0, "projector_head": "mlp"}),
}
NO_STAGE_1 = "no-stage-1"


def parse_variant(text: str) -> Variant:
    """A variant out of its words; ConfigError for what is unknown, says nothing, or contradicts itself."""
    changes: dict[str, dict[str, Any]] = {"pretrain": {}, "sft": {}, "both": {}}
    stage_1 = True
    for word in text.split("+"):
        if word == NO_STAGE_1:
            stage_1 = False
            continue
        part, options = _change(text, word)
        for option in options:
            if any(option in known for known in changes.values()):
                raise ConfigError(f"--variants: {text!r} sets {option} twice; give it once")
        changes[part] |= options
    return Variant(text, **changes, stage_1=stage_1)


def parse_variants(texts: tuple[str, ...], sft_steps: int) -> list[Variant]:
    """The base and the variants; ConfigError where one occurs twice or needs a stage that is not trained."""
    variants = [BASE, *map(parse_variant, texts)]
    names = [variant.name for variant in variants]
    for variant in variants:
        if names.count(variant.name) > 1:
            raise ConfigError(f"--variants: {variant.name!r} is there twice; give each once")
        if not sft_steps and (variant.sft or not variant.stage_1):
            raise ConfigError(f"--variants: {variant.name!r} is about stage 2, which has no steps; give --sft-steps")
    return variants


def base_codec(texts: tuple[str, ...]) -> Codec | None:
    """What the base reads: where a variant names a codec the cache has several, so it is said; else what is there."""
    named = any("codec" in parse_variant(text).both for text in texts)
    return EncodeConfig.codec if named else None


def _change(text: str, word: str) -> _Change:
    if word in _PLAIN:
        return _PLAIN[word]
    name, equals, value = word.partition("=")
    if not equals or name not in _VALUED:
        known = [*_PLAIN, *(f"{key}=..." for key in _VALUED), NO_STAGE_1]
        raise ConfigError(f"--variants: {word!r} in {text!r} is unknown; use {', '.join(known)}")
    try:
        return _VALUED[name](value)
    except ValueError as expected:
        raise ConfigError(f"--variants: expected {expected} after {name}=, found {value!r}") from None
