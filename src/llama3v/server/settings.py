"""The config file: the options of `llama3v serve`, under the same names, and the keys."""

import dataclasses
import ipaddress
import tomllib
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llama3v.config import ServeConfig
from llama3v.errors import ConfigError
from llama3v.server.keys import Key

_NOT_IN_FILE = ("config", "make_key")


def read_settings(config: ServeConfig) -> tuple[ServeConfig, list[Key]]:
    """The options with those of the config file, and its keys. An option that is not at its default wins over the file.

    Raises ConfigError: the file cannot be read, names what does not exist, or the server would be open to others without
    a key.
    """
    options, keys = _read(config.config) if config.config else ({}, [])
    fields = {field.name: field for field in dataclasses.fields(ServeConfig)}
    given = {name for name, field in fields.items() if getattr(config, name) != field.default}
    merged = dataclasses.replace(config, **{name: value for name, value in options.items() if name not in given})
    if not keys and not is_loopback(merged.host):
        raise ConfigError(
            f"--host {merged.host} lets other machines in, which needs a key: make one with `llama3v serve --make-key "
            "NAME`, put its lines into a file and give that as --config"
        )
    return merged, keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read(path: Path) -> tuple[dict[str, Any], list[Key]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, but {error}") from error
    try:
        keys = TypeAdapter(list[Key]).validate_python(content.pop("keys", []))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: keys.{place}: {first['msg']}; `llama3v serve --make-key NAME` writes one"
        ) from error
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: two keys have the same name; give each its own")
    types = {name: kind for name, kind in typing.get_type_hints(ServeConfig).items() if name not in _NOT_IN_FILE}
    unknown = sorted(set(content) - set(types))
    if unknown:
        raise ConfigError(f"{path}: there is no option {unknown[0]}; expected keys, {', '.join(sorted(types))}")
    return {name: _as(path, name, types[name], value) for name, value in content.items()}, keys


def _as(path: Path, name: str, kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{path}: {name}: {error.errors()[0]['msg']}") from error
