"""Named ways to a trained model. Each docstring states the command, the hardware, the time, the dollars and the score.

`quickstart` is also a verb; for the others see `examples/` and docs/training.md.
"""

from importlib import import_module
from typing import Any

_HOMES = {"quickstart": "llama3v.recipes.quickstart", "smol": "llama3v.recipes.smol"}
__all__ = ["quickstart", "smol"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama3v.recipes' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
