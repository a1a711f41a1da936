"""The verb `export`: a trained model in a stock form, checked before it is called done."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama3v.config import ExportConfig
from llama3v.errors import CheckpointError


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a trained model in a stock form that other programs load without this package.

    The directory appears whole or not at all: it is written beside `config.out`, checked, and renamed.

    Returns:
        the summary that also lies in the directory as summary.json: format, form, sizes, warnings, and under "check"
        the largest differences between the export and this package.

    Raises:
        CheckpointError: no model there, no stock form for it, an export that disagrees, or an `out` that holds
            something else.
    """
    refuse_foreign(config.out, "export")

    if config.format == "gguf":
        _require_llama_cpp(config)
    write = _gguf if config.format == "gguf" else _hf
    with appearing(config.out) as directory:
        summary: dict[str, Any] = {"verb": "export", "model": str(config.model)}
        summary |= write(config, directory)
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _tell(summary, config.out)
    return summary


def _hf(config: ExportConfig, directory: Path) -> dict[str, Any]:
    import transformers

    from llama3v.exporters import check, hf, licence
    from llama3v.model.llama3v import load_model

    model, tokenizer = load_model(config.model)
    tokens_per_tile = model.tokens_per_tile
    summary = hf.write_stock(model, tokenizer, directory, form=config.form, dtype=_stored_type(config.model))
    summary["warnings"] = licence.warnings(summary["base"], config.out)
    if config.check:
        expected = check.reference_outputs(model, tokenizer)
        del model  # two copies of a large LLM need not be in memory at once
        summary["check"] = check.compare(expected, directory, tokens_per_tile)
        if not summary["check"]["template_gives_our_ids"]:
            summary["warnings"].append(
                "this tokenizer joins pieces of the chat template that training kept apart: give the export token "
                "ids of llama3v's prompt, not the template's text"
            )
    return summary | {"transformers": transformers.__version__}


def _gguf(config: ExportConfig, directory: Path) -> dict[str, Any]:
    from llama3v.engines.llama_api import VERSION
    from llama3v.exporters import check, gguf, gguf_check, licence
    from llama3v.model.llama3v import load_model
    from llama3v.model.prompt import Renderer

    model, tokenizer = load_model(config.model)
    weights = config.weights or _GGUF_TYPES[_stored_type(config.model)]
    summary = gguf.write_gguf(model, tokenizer, directory, weights=weights)
    summary["warnings"] = licence.warnings(summary["base"], config.out)
    if config.check:
        settings, tower = model.config, model.vision
        renderer = Renderer(tokenizer, settings.prompt_format, model.tokens_per_tile, settings.image_token_id)
        expected = check.reference_outputs(model, tokenizer)
        del model
        summary["check"] = gguf_check.compare(expected, directory, renderer, tower, weights)
        summary["xllamacpp"] = VERSION
        if not summary["check"]["tokenizer_gives_our_ids"]:
            summary["warnings"].append(
                "llama.cpp's tokenizer joins pieces of the chat template that training kept apart: `llama3v ask` gives "
                "the model its own ids, stock programs slightly other ones"
            )
    return summary


def _require_llama_cpp(config: ExportConfig) -> None:
    """ConfigError, naming the extra, before a model is loaded for nothing."""
    from llama3v.engines.llama_api import library_path
    from llama3v.exporters.gguf import require_gguf_package

    require_gguf_package()
    if config.check or config.weights == "q4_k_m":
        library_path()


_GGUF_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def _stored_type(name_or_directory: str) -> str:
    """The type in which the model's weights lie on disk; a model is loaded, and checked, in float32."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(name_or_directory).dtype
    return str(dtype or "float32").removeprefix("torch.")


def refuse_foreign(out: Path, verb: str) -> None:
    """What a verb wrote may be replaced by itself, and an empty directory filled; nothing else is touched.

    Raises CheckpointError.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file; give --out a directory")
    if any(out.iterdir()) and not _is_from(verb, out):
        raise CheckpointError(f"{out} is not empty and holds no earlier {verb}; give another --out")


def _is_from(verb: str, directory: Path) -> bool:
    try:
        return json.loads((directory / "summary.json").read_text()).get("verb") == verb
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write into; it takes the name `out` when the body succeeds, else it vanishes."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _tell(summary: dict[str, Any], out: Path) -> None:
    print(f"{out}: {summary['form']}, {summary['tensors']} tensors, {summary['bytes'] / 1e6:,.1f} MB")
    if "check" in summary:
        print(_gguf_check(summary["check"]) if summary["format"] == "gguf" else _hf_check(summary["check"]))
    for warning in summary["warnings"]:
        print(f"note: {warning}")


def _hf_check(check: dict[str, Any]) -> str:
    keys = ("features", "visual_tokens", "logits")
    differences = ", ".join(f"{key.replace('_', ' ')} {check[key]:.1e}" for key in keys)
    return f"stock transformers agrees: greedy tokens equal; largest differences: {differences}"


def _gguf_check(check: dict[str, Any]) -> str:
    return (
        f"llama.cpp: greedy tokens equal in {check['greedy_equal']} of {len(check['cases'])} conversations; largest "
        f"differences: visual tokens {check['visual_tokens']:.1e}, logits {check['logits']:.1e}"
    )
