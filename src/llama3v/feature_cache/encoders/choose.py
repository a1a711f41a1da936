"""Which engine runs the tower: the one that is named, or with `auto` the fastest of those that are installed here.

Whatever is chosen has first given, for one picture, the features that torch gives on the CPU in fp32. So a runtime that is
wrong on some machine, whose records nobody could tell from right ones later, is refused before it writes any.
"""

import importlib.util
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llama3v.config import Engine, Precision
from llama3v.errors import CheckpointError, ConfigError, Llama3VError
from llama3v.feature_cache.encoders.base import NormalisedTrunk, TrunkEncoder
from llama3v.model.vision import VisionTower

_NEEDS = {
    "torch": (),
    "torch-compile": (),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "mlx": ("mlx.core",),
}
"""Engine -> the modules that its extra installs."""

LARGEST_ERROR = {"fp32": 0.01, "bf16": 0.1}
"""|features - torch's in fp32| / |torch's in fp32|, over one tile. Storing in bf16 alone makes it about 0.002."""
_SECONDS_TO_MEASURE = 1.0


def require_engine(engine: Engine) -> None:
    """ConfigError, naming the extra, where the engine is not installed. Cheap: imports no runtime."""
    absent = [name for name in _NEEDS.get(engine, ()) if not _is_installed(name)]
    if absent:
        raise _not_installed(engine, f"there is no module {absent[0]}")


def open_encoder(engine: Engine, tower: VisionTower, *, precision: Precision, batch_tiles: int) -> TrunkEncoder:
    """An engine that is ready to encode, checked on this machine. `auto` says on stderr what it chose and why.

    Args:
        tower: on the CPU, in fp32; it is not changed.
        batch_tiles: `TrunkEncoder.encode` will be given this many tiles.

    Raises:
        ConfigError: the engine is not installed, cannot run this tower, or computes other features than torch.
        CheckpointError: torch's features are not finite.
    """
    reference = _reference(tower)
    if engine != "auto":
        return _open(engine, tower, precision, batch_tiles, reference)
    best, speeds, left_out = None, {}, []
    for name in _candidates():
        try:
            encoder = _open(name, tower, precision, batch_tiles, reference)
        except Llama3VError as error:
            left_out.append(f"{name} (not installed)" if not _can_import(name) else f"{name} ({error})")
            continue
        speeds[name] = tiles_per_second(encoder, tower.tile_size)
        if best is None or speeds[name] > speeds[best.name]:
            best = encoder
    assert best is not None, "torch is always there"
    print(_in_words(best, speeds, left_out), file=sys.stderr)
    return best


def tiles_per_second(encoder: TrunkEncoder, tile_size: int, seconds: float = _SECONDS_TO_MEASURE) -> float:
    """Tiles per second of passes that take `seconds` together, at least one of them."""
    tiles = picture(encoder.tiles_in_pass, tile_size)
    passes, started = 0, time.perf_counter()
    while not passes or time.perf_counter() - started < seconds:
        encoder.encode(tiles)
        passes += 1
    return passes * encoder.tiles_in_pass / (time.perf_counter() - started)


def picture(tiles: int, tile_size: int) -> np.ndarray:
    """uint8 [tiles, tile_size, tile_size, 3]: a gradient under noise, always the same."""
    noise = np.random.default_rng(0).integers(0, 128, (tiles, tile_size, tile_size, 3))
    ramp = np.linspace(0, 127, tile_size).astype(np.int64)
    return (noise + ramp[None, :, None, None]).astype(np.uint8)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in fp32; not finite where `found` is not."""
    expected = expected.float()
    return ((found.float() - expected).norm() / expected.norm()).item()


def _open(engine: str, tower: VisionTower, precision: Precision, batch_tiles: int, reference: Tensor) -> TrunkEncoder:
    try:
        encoder = _class_of(engine)(tower, precision, batch_tiles)
    except ImportError as error:
        raise _not_installed(engine, str(error)) from error
    found = encoder.encode(picture(encoder.tiles_in_pass, tower.tile_size))[:1]
    difference = relative_error(found, reference)
    if not difference <= LARGEST_ERROR[precision]:
        raise ConfigError(
            f"the engine {engine} does not compute this tower's features on this machine: in {precision} they differ "
            f"from torch's by {difference:.1%}, expected at most {LARGEST_ERROR[precision]:.0%}; give --engine torch"
        )
    return encoder


def _class_of(engine: str) -> Callable[[VisionTower, Precision, int], TrunkEncoder]:
    """The engine's class. Imports no runtime but torch: constructors do."""
    from llama3v.feature_cache.encoders import mlx, onnxruntime, openvino
    from llama3v.feature_cache.encoders import torch as torch_engines

    return {
        "torch": torch_engines.TorchEncoder,
        "torch-compile": torch_engines.CompiledTorchEncoder,
        "openvino": openvino.OpenVinoEncoder,
        "onnxruntime": onnxruntime.OnnxRuntimeEncoder,
        "mlx": mlx.MlxEncoder,
    }[engine]


def _candidates() -> list[str]:
    """What `auto` measures. On a CPU torch.compile takes longer to compile than it wins back."""
    return [name for name in _NEEDS if name != "torch-compile" or torch.cuda.is_available()]


def _reference(tower: VisionTower) -> Tensor:
    """fp32 [1, patches, width]: torch's features of the first tile of `picture`."""
    with torch.no_grad():
        features = NormalisedTrunk(tower)(torch.from_numpy(picture(1, tower.tile_size)))
    if not features.isfinite().all():
        raise CheckpointError(
            "the vision tower gives NaN or infinite features for an ordinary picture; its weights are broken, fetch "
            "them again"
        )
    return features


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False


def _can_import(engine: str) -> bool:
    return all(map(_is_installed, _NEEDS[engine]))


def _not_installed(engine: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the engine {engine} is not installed ({reason}): pip install 'llama3v[{engine}]', or give --engine torch"
    )


def _in_words(best: TrunkEncoder, speeds: dict[str, float], left_out: list[str]) -> str:
    others = [f"{name} {speed:.3g}" for name, speed in speeds.items() if name != best.name]
    compared = f"; {', '.join(others)}" if others else ""
    not_measured = f"; left out: {', '.join(left_out)}" if left_out else ""
    return (
        f"engine {best.name} ({best.precision}, {best.device}): {speeds[best.name]:.3g} tiles/s{compared}{not_measured}"
    )
