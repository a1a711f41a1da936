"""Which engine runs a model: the one that is named, or with `auto` the fastest of those that can, measured here."""

import gc
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

from llama3v.config import Running
from llama3v.engines.base import Engine, Room
from llama3v.engines.llamacpp import is_gguf_pair
from llama3v.errors import ConfigError
from llama3v.model.prompt import Turn

NEEDS = {"torch": (), "llamacpp": ("xllamacpp", "gguf"), "mlx": ("mlx", "mlx_lm")}
"""Engine -> the modules that its extra installs."""
_TOKENS = 16  # that an answer has when engines are compared
_QUESTION = [Turn("user", "Count from one to twenty in words.")]


@dataclass(frozen=True)
class Choice:
    """An opened engine, and in words why it was taken ("" where there was nothing to choose)."""

    engine: Engine
    reason: str = ""


def open_engine(
    model: str | Path,
    running: Running = Running(),  # noqa: B008 (frozen)
    *,
    conversations: int = 1,
    room: Room | None = None,
) -> Choice:
    """The engine of a model directory, GGUF pair or hub name.

    Args:
        running: on what, and how.
        conversations: see Engine.
        room: see LlamaCppEngine; others do not need it.

    Raises CheckpointError, and ConfigError where an extra is missing or the engine cannot run this kind of model.
    """
    if running.engine != "auto":
        default = "llamacpp" if is_gguf_pair(model) else "torch"
        return Choice(_open(running.engine or default, model, running, conversations, room))
    engine: Engine | None = None
    speeds: dict[str, float] = {}
    left_out = []
    for name in NEEDS:
        engine = None
        gc.collect()  # two copies of a model at once may be more than the memory holds
        try:
            engine = _open(name, model, running, conversations, room)
        except ConfigError as error:  # another error is of the model, and holds for every engine
            left_out.append(f"{name} ({str(error).split(':')[0]})")
            continue
        speeds[name] = tokens_per_second(engine)
    if not speeds:
        raise ConfigError(f"no engine can run {model}: {'; '.join(left_out)}")
    best = max(speeds, key=lambda name: speeds[name])
    if engine is None or engine.name != best:
        engine = None
        gc.collect()
        engine = _open(best, model, running, conversations, room)
    others = "".join(f"; {name} {speed:.3g}" for name, speed in speeds.items() if name != best)
    omitted = f"; left out: {', '.join(left_out)}" if left_out else ""
    return Choice(engine, f"engine {best}: {speeds[best]:.3g} tokens/s{others}{omitted}")


def tokens_per_second(engine: Engine) -> float:
    """Tokens of a short answer, its prompt included, per second; after one that warms up."""
    for _ in range(2):
        started = time.perf_counter()
        generation = engine.generate(_QUESTION, max_new_tokens=_TOKENS)
        for _piece in generation:
            pass
        seconds = time.perf_counter() - started
    return max(1, generation.counts.new_tokens) / seconds


def _open(name: str, model: str | Path, running: Running, conversations: int, room: Room | None) -> Engine:
    absent = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
    if absent:
        raise ConfigError(
            f"the engine {name} is not installed (there is no module {absent[0]}): pip install 'llama3v[{name}]'"
        )
    if (name == "llamacpp") != is_gguf_pair(model):
        raise ConfigError(
            f"the engine llamacpp runs a GGUF pair, and {model} is none: write one with `llama3v export --format gguf`"
            if name == "llamacpp"
            else f"{model} is a GGUF pair, which the engine {name} does not run: give --engine llamacpp"
        )
    if name == "llamacpp":
        if running.weights != "full":
            raise ConfigError(
                f"--weights {running.weights} is decided when a GGUF pair is written: `llama3v export --format gguf "
                f"--weights {'q8_0' if running.weights == 'int8' else 'q4_k_m'}`, and then ask with --weights full"
            )
        from llama3v.engines.llamacpp import LlamaCppEngine

        kv, context = running.kv or "f16", running.context
        return LlamaCppEngine(model, kv=kv, context_tokens=context, conversations=conversations, room=room)
    for option, value in (("--kv", running.kv), ("--context", running.context)):
        if value is not None:
            raise ConfigError(
                f"{option} {value} is for the engine llamacpp, and the engine {name} makes its KV cache as it is needed: "
                f"leave it away, or give a GGUF pair of `llama3v export --format gguf`"
            )
    if name == "mlx":
        from llama3v.engines.mlx import MlxEngine

        return MlxEngine(model, weights=running.weights, conversations=conversations)
    from llama3v.engines.torch import TorchEngine  # slow to import

    return TorchEngine(model, weights=running.weights, conversations=conversations)
