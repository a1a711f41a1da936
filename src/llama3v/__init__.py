"""Llama 3-V: give a language model eyes, cheaply, and run the result anywhere.

Each command-line verb is one documented function here: ``llama3v.encode(llama3v.EncodeConfig(...))``.
Everything heavy is imported on first use, so ``import llama3v`` and ``llama3v --help`` are quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> the module that holds it
_HOMES = {
    "quickstart": "llama3v.recipes.quickstart",
    "encode": "llama3v.feature_cache.encode",
    "cache": "llama3v.feature_cache.tools",
    "pretrain": "llama3v.train.run",
    "sft": "llama3v.train.run",
    "ask": "llama3v.engines.ask",
    "chat": "llama3v.engines.chat",
    "caption": "llama3v.engines.captions",
    "serve": "llama3v.server.verb",
    "export": "llama3v.exporters.verbs",
    "merge": "llama3v.exporters.merge",
    "doctor": "llama3v.diagnosis.verb",
    "eval": "llama3v.evaluate.verb",
    "compare": "llama3v.evaluate.comparison",
    "ablate": "llama3v.evaluate.ablation",
    "QuickstartConfig": "llama3v.config",
    "EncodeConfig": "llama3v.config",
    "CacheConfig": "llama3v.config",
    "PretrainConfig": "llama3v.config",
    "SftConfig": "llama3v.config",
    "AskConfig": "llama3v.config",
    "ChatConfig": "llama3v.config",
    "CaptionConfig": "llama3v.config",
    "ExportConfig": "llama3v.config",
    "ServeConfig": "llama3v.config",
    "MergeConfig": "llama3v.config",
    "DoctorConfig": "llama3v.config",
    "EvalConfig": "llama3v.config",
    "CompareConfig": "llama3v.config",
    "AblateConfig": "llama3v.config",
    "Llama3VConfig": "llama3v.model.llama3v",
    "Llama3VForConditionalGeneration": "llama3v.model.llama3v",
    "choose_grid": "llama3v.model.slicing",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama3v' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
