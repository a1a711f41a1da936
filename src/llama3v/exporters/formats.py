"""The formats of the verb `export`: each writes a directory, checks it, and says so in a line."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import ExportConfig

if TYPE_CHECKING:
    from llama3v.engines.vision_file import Runtime

_RUNTIMES: dict[str, "Runtime"] = {"openvino": "openvino", "onnx": "onnxruntime"}
"""Name of a format -> the runtime that reads it."""


def require_packages(config: ExportConfig) -> None:
    """ConfigError, naming the extra, before a model is loaded for nothing."""
    if config.format == "gguf":
        from llama3v.engines.llama_api import library_path
        from llama3v.exporters.gguf import require_gguf_package

        require_gguf_package()
        if config.check or config.weights == "q4_k_m":
            library_path()
    if config.format == "mlx":
        from llama3v.exporters.mlx import require_mlx_vlm

        require_mlx_vlm()
    runtime = _RUNTIMES.get(config.format) or _RUNTIMES.get(config.tower)
    if runtime is not None:
        from llama3v.engines.vision_file import require_runtime
        from llama3v.exporters.vision_files import require_writer

        require_writer(runtime)
        if config.check:
            require_runtime(runtime)


def write(config: ExportConfig, directory: Path) -> dict[str, Any]:
    """Write and check the export in an existing, empty directory; returns what the summary should say."""
    writers = {"hf": _hf, "gguf": _gguf, "mlx": _mlx, "openvino": _vision, "onnx": _vision}
    return writers[config.format](config, directory)


def _distribution(config: ExportConfig, directory: Path, base: str | None) -> list[str]:
    """Complete the model card; returns what the user must do before the export is distributed."""
    from llama3v.exporters import card, licence

    return card.finish_card(directory, config.model, base) + licence.warnings(base, config.out)


def in_words(summary: dict[str, Any]) -> str:
    """What was written, and what its check found."""
    text = f"{summary['form']}, {summary['tensors']} tensors, {summary['bytes'] / 1e6:,.1f} MB"
    if summary.get("vision_file"):
        text += f"; {summary['vision_file']}, {summary['vision_file_bytes'] / 1e6:,.1f} MB"
    check = summary.get("check")
    return text if check is None else f"{text}\n{_CHECKS[summary['format']](check)}"


def _hf(config: ExportConfig, directory: Path) -> dict[str, Any]:
    import transformers

    from llama3v.exporters import check, hf
    from llama3v.model.llama3v import load_model

    model, tokenizer = load_model(config.model)
    tokens_per_tile = model.tokens_per_tile
    summary = hf.write_stock(
        model, tokenizer, directory, form=config.form, dtype=_stored_type(config.model), program=config.program
    )
    summary["warnings"] = _distribution(config, directory, summary["base"])
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
    from llama3v.exporters import check, gguf, gguf_check
    from llama3v.exporters.vision_check import compare_vision
    from llama3v.model.llama3v import load_model
    from llama3v.model.prompt import Renderer

    model, tokenizer = load_model(config.model)
    weights = config.weights or _SHORT_NAMES[_stored_type(config.model)]
    runtime = _runtime_of(config)
    summary = gguf.write_gguf(model, tokenizer, directory, weights=weights, runtime=runtime)
    summary["warnings"] = _distribution(config, directory, summary["base"])
    if runtime is None and config.tower == "auto":
        summary["warnings"].append(
            "without a vision file, ask needs PyTorch; for one: pip install 'llama3v[openvino]', and export again"
        )
    if config.check:
        settings, tower = model.config, model.vision
        renderer = Renderer(tokenizer, settings.prompt_format, model.tokens_per_tile, settings.image_token_id)
        expected = check.reference_outputs(model, tokenizer)
        del model
        summary["check"] = gguf_check.compare(expected, directory, renderer, tower, weights)
        if runtime is not None:
            found = compare_vision(expected, directory, runtime, half=weights != "f32")
            summary["check"]["vision_file"] = found["visual_tokens"]
        summary["xllamacpp"] = VERSION
        if not summary["check"]["tokenizer_gives_our_ids"]:
            summary["warnings"].append(
                "llama.cpp's tokenizer joins pieces of the chat template that training kept apart: `llama3v ask` gives "
                "the model its own ids, stock programs slightly other ones"
            )
    return summary


def _mlx(config: ExportConfig, directory: Path) -> dict[str, Any]:
    from importlib.metadata import version
    from tempfile import TemporaryDirectory

    from llama3v.exporters import check, hf, licence, mlx, texts
    from llama3v.model.llama3v import load_model

    model, tokenizer = load_model(config.model)
    settings, tower = model.config, hf.foldable_tower(model)
    weights = config.weights or _SHORT_NAMES[_stored_type(config.model)]
    # What quantisation leaves alone is in half of the bytes, as everywhere in MLX
    dtype = {name: kind for kind, name in _SHORT_NAMES.items()}.get(weights, "bfloat16")
    with TemporaryDirectory(dir=directory.parent) as work:
        summary = hf.write_stock(model, tokenizer, Path(work), form="smolvlm", dtype=dtype)
        mlx.convert(Path(work), directory, weights=weights, hidden=settings.text_config.hidden_size)
    text = texts.mlx_readme(tower.tile_size, model.tokens_per_tile, licence.built_with(summary["base"]))
    (directory / "README.md").write_text(text)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    summary |= {"format": "mlx", "weights": weights, "bytes": size, "mlx_vlm": version("mlx-vlm")}
    summary["warnings"] = _distribution(config, directory, summary["base"])
    rope = getattr(settings.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        summary["warnings"].append(
            f"mlx-vlm does not scale positions as {rope['rope_type']} does: long prompts will go wrong there"
        )
    if config.check:
        expected = check.reference_outputs(model, tokenizer)
        del model
        summary["check"] = mlx.compare(expected, directory, weights, settings.image_token_id)
    return summary


def _vision(config: ExportConfig, directory: Path) -> dict[str, Any]:
    from llama3v.engines.vision_file import FILES
    from llama3v.exporters import check, licence, texts, vision_files
    from llama3v.exporters.hf import foldable_tower
    from llama3v.exporters.vision_check import compare_vision
    from llama3v.model.llama3v import load_model

    runtime = _RUNTIMES[config.format]
    model, tokenizer = load_model(config.model)
    tower = foldable_tower(model)
    weights = config.weights or ("f32" if _stored_type(config.model) == "float32" else "f16")
    half = weights == "f16"
    size = vision_files.write_vision_file(model, tower, directory, runtime=runtime, half=half)
    base = licence.base_of(model.config.text_config, tokenizer)  # the projector is trained for this LLM
    facts = vision_files.facts_of(model, tower)
    (directory / "README.md").write_text(texts.vision_readme(runtime, facts, licence.built_with(base)))
    summary = {
        "format": config.format,
        "form": FILES[runtime],
        "weights": weights,
        "tensors": sum(len(part.state_dict()) for part in (tower, model.projector)),
        "bytes": size,
        "tokens_per_tile": model.tokens_per_tile,
        "base": base,
        "warnings": _distribution(config, directory, base),
        runtime: vision_files.require_writer(runtime).__version__,
    }
    if config.check:
        expected = check.reference_outputs(model, tokenizer)
        summary["check"] = compare_vision(expected, directory, runtime, half=half, model=model)
    return summary


def _runtime_of(config: ExportConfig) -> "Runtime | None":
    """Whose vision file a GGUF pair gets."""
    from llama3v.engines.vision_file import is_installed

    if config.tower != "auto":
        return _RUNTIMES.get(config.tower)
    if importlib.util.find_spec("onnx") is None:  # both kinds are written with it
        return None
    return next((runtime for runtime in _RUNTIMES.values() if is_installed(runtime)), None)


_SHORT_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def _stored_type(name_or_directory: str) -> str:
    """The type in which the model's weights lie on disk; a model is loaded, and checked, in float32."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(name_or_directory).dtype
    return str(dtype or "float32").removeprefix("torch.")


def _hf_check(check: dict[str, Any]) -> str:
    keys = ("features", "visual_tokens", "logits")
    differences = ", ".join(f"{key.replace('_', ' ')} {check[key]:.1e}" for key in keys)
    return f"stock transformers agrees: greedy tokens equal; largest differences: {differences}"


def _gguf_check(check: dict[str, Any]) -> str:
    vision_file = f", of the vision file {check['vision_file']:.1e}" if "vision_file" in check else ""
    return (
        f"llama.cpp: greedy tokens equal in {check['greedy_equal']} of {len(check['cases'])} conversations; largest "
        f"differences: visual tokens {check['visual_tokens']:.1e}{vision_file}, logits {check['logits']:.1e}"
    )


def _vision_check(check: dict[str, Any]) -> str:
    return (
        f"its runtime alone: largest difference of visual tokens {check['visual_tokens']:.1e}; with them, this package's "
        f"LLM gives equal greedy tokens in {check['greedy_equal']} of {len(check['cases'])} conversations"
    )


def _mlx_check(check: dict[str, Any]) -> str:
    return (
        f"mlx-vlm: greedy tokens equal in {check['greedy_equal']} of {len(check['cases'])} conversations; largest "
        f"differences: visual tokens {check['visual_tokens']:.1e}, logits {check['logits']:.1e}"
    )


_CHECKS = {"hf": _hf_check, "gguf": _gguf_check, "mlx": _mlx_check, "openvino": _vision_check, "onnx": _vision_check}
