"""What this machine does in a second: products, reading weights, tiles of a tower, tokens of an answer."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, get_args

from llama3v.errors import Llama3VError

SO400M = {"tile_size": 384, "patch_size": 14, "width": 1152, "heads": 16, "mlp_size": 4304}
SO400M_LAYERS = 26
_WEIGHTS = 64 * 2**20  # numbers in the matrix that is read: more than any cache holds
_ROUNDS = 5


def products() -> dict[str, float]:
    """Floating-point operations per second of matrix products, in fp32 and bf16."""
    from llama3v.feature_cache.encoders.torch import best_device
    from llama3v.train.gemm import gemm_rate

    device = best_device()
    return {"fp32": gemm_rate(device, bf16=False), "bf16": gemm_rate(device, bf16=True)}


def bandwidth(device: str | None = None) -> float:
    """Bytes per second at which a matrix is read, to multiply a vector: what bounds tokens per second.

    Args:
        device: default: a GPU where there is one.
    """
    import torch

    from llama3v.feature_cache.encoders.torch import best_device

    device = device or best_device().type
    matrix = torch.ones(_WEIGHTS // 8192, 8192, device=device)
    vector = torch.ones(8192, device=device)
    seconds = []
    for _ in range(_ROUNDS):
        started = perf_counter()
        float((matrix @ vector)[0])  # waits for the device
        seconds.append(perf_counter() - started)
    return matrix.nbytes / min(seconds)


def towers(seconds: float) -> dict[str, float | str]:
    """Encode engine -> seconds of a tile of SigLIP so400m, from one of its layers at its size; or why it cannot."""
    import torch

    from llama3v.config import Engine
    from llama3v.feature_cache.encoders.choose import open_encoder, require_engine, tiles_per_second
    from llama3v.model.vision import SiglipTower

    torch.manual_seed(0)
    tower = SiglipTower(SO400M | {"depth": 1, "cut": 1}).requires_grad_(False).eval()

    def measure(name: Any) -> float:
        require_engine(name)
        encoder = open_encoder(name, tower, precision="fp32", batch_tiles=1)
        return SO400M_LAYERS / tiles_per_second(encoder, tower.tile_size, seconds)

    absent = {"auto", "torch-compile"} | (set() if sys.platform == "darwin" else {"mlx"})  # elsewhere it is for tests
    names = [name for name in get_args(Engine) if name not in absent]
    return {name: _or_reason(measure, name) for name in names}


def decoders() -> dict[str, float | str]:
    """Engine -> tokens per second of the embedded model; or why it cannot."""
    from llama3v.config import ExportConfig, Running
    from llama3v.engines import choose
    from llama3v.exporters.verbs import export
    from llama3v.model.llama3v import build_model, save_model

    assets = Path(choose.__file__).parents[1] / "assets"
    with TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        model, pair = Path(work) / "model", Path(work) / "pair"
        save_model(*build_model(str(assets / "siglip-scenes"), str(assets / "llama-scenes")), model)

        def measure(name: Any) -> float:
            directory = model
            if name == "llamacpp":
                directory = pair
                export(ExportConfig(out=pair, model=str(model), format="gguf", tower="none", check=False))
            return choose.tokens_per_second(choose.open_engine(directory, Running(engine=name)).engine)

        return {name: _or_reason(measure, name) for name in choose.NEEDS}


def _or_reason(measure: Callable[[str], float], name: str) -> float | str:
    try:
        return measure(name)
    except Llama3VError as error:
        return str(error)
