"""What lies where a Llama 3-V is looked for: another kind of checkpoint is named, with what to do. No torch here."""

import json
import re
from pathlib import Path
from typing import Any

from llama3v.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]*[A-Za-z0-9])?")
LLM_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
_PAIR = (LLM_FILE, VISION_FILE)
_VISION_FILES = {"vision.xml": "openvino", "vision.onnx": "onnx"}
_KINDS = {
    "llama": "a language model: `llama3v pretrain --llm {path}` gives it eyes",
    "siglip": "a vision tower: `llama3v pretrain --vision {path}` builds on it",
    "siglip_vision_model": "a vision tower: `llama3v pretrain --vision {path}` builds on it",
    "smolvlm": "a stock SmolVLM checkpoint, such as `llama3v export --format hf` or mlx writes, {theirs}",
    "idefics3": "a stock Idefics3 checkpoint, such as `llama3v export --format hf` or mlx writes, {theirs}",
}
"""model_type of another checkpoint -> what it is, and what to do with it."""
_THEIRS = "for transformers, vLLM or mlx-vlm; here, give {origin}"


def require_model(name: Path | str) -> None:
    """Raises CheckpointError where `name` is a path and no Llama 3-V lies there. What may be a hub's name passes."""
    path = Path(name)
    if not path.exists():
        if _HUB_NAME.fullmatch(str(name)) is None:
            raise CheckpointError(
                f"no Llama 3-V at {path}: there is no such directory; train one with `llama3v quickstart --out {path}`"
            )
        return
    if not path.is_dir():
        raise CheckpointError(f"no Llama 3-V at {path}: {_of_file(path)}")
    if (path / "config.json").is_file():
        _require_config(path)
    else:
        raise CheckpointError(f"no Llama 3-V at {path}: {_of_directory(path)}")


def _require_config(path: Path) -> None:
    config = _json(path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind == "llama3v":
        return
    origin = _origin(path)
    hint = _KINDS.get(str(kind), "which is none that is known here; build one with `llama3v pretrain`")
    hint = hint.format(path=path, theirs=_THEIRS.format(origin=origin))
    raise CheckpointError(f"{path} holds a {kind!r} model, not a Llama 3-V: {hint}")


def _of_file(path: Path) -> str:
    if path.suffix != ".gguf":
        return f"it is a file; give the directory of a model, such as {path.parent}"
    absent = [name for name in _PAIR if not (path.parent / name).is_file()]
    if not absent:
        return f"it is one half of a GGUF pair; give its directory, {path.parent}"
    return (
        f"it is a GGUF file without {' and '.join(absent)} beside it; give the directory of a pair that `llama3v export "
        f"--format gguf` wrote, or build on a language model with `llama3v pretrain --llm {path}`"
    )


def _of_directory(path: Path) -> str:
    for file, form in _VISION_FILES.items():
        if (path / file).is_file() and not (path / VISION_FILE).is_file():
            return f"{file} is a vision tower alone, exported with --format {form}; give {_origin(path)}"
    halves = [file for file in _PAIR if (path / file).is_file()]
    if halves:
        return f"there is {halves[0]} alone; a GGUF pair is {' and '.join(_PAIR)}, so export the model again"
    return f"no config.json there; train one with `llama3v quickstart --out {path}`"


def _origin(export: Path) -> str:
    """The model that an export was made of, in words."""
    try:
        found = json.loads((export / "summary.json").read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the model that it was exported from"
    return f"the model that it was exported from, {found}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
