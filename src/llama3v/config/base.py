"""What the options of several verbs share: choices, optional types, checks."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from llama3v.errors import ConfigError

Precision = Literal["fp32", "bf16"]
Codec = Literal["bf16", "int8", "fp8"]

# What may stay unset: its description says what happens then, so help does not add "(default: None)".
MaybeInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
MaybeText = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]
MaybeFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_directory(path: Path, name: str) -> None:
    """ConfigError where an option of this name is no directory and cannot become one."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    require(there.is_dir(), f"{option(name)} {path}: expected a directory, found the file {there}; give another")
    require(os.access(there, os.W_OK), f"{option(name)} {path}: {there} cannot be written; give another")


def is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def bytes(text: str) -> int:
    """Bytes in words: 200GB, 1.5TB, 500MiB. 0 for what is no such number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None:
        return 0
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix.replace("K", "k") or " "))


def is_default(options: object, name: str) -> bool:
    return getattr(options, name) == type(options).__dataclass_fields__[name].default  # type: ignore[attr-defined]


def option(name: str) -> str:
    return "--" + name.replace("_", "-")
