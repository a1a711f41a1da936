"""Tower and projector as one file, run by OpenVINO or ONNX Runtime. No torch here: `ask` is ready in a second.

`llama3v export` writes such files (exporters/vision_files.py). What a program must know of them stands inside: see
`VisionFacts`.
"""

import importlib.util
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.tiles import Tiles, normalised

Runtime = Literal["openvino", "onnxruntime"]
FILES: dict[Runtime, str] = {"openvino": "vision.xml", "onnxruntime": "vision.onnx"}
"""Runtime -> the file that it reads; OpenVINO's weights lie beside it in vision.bin. The preferred one first."""
INPUT, OUTPUT = "pixel_values", "visual_tokens"
OUR_KEYS = "llama3v"
"""Prefix of our entries in a file's metadata."""


@dataclass(frozen=True)
class VisionFacts:
    """What stands in the metadata of such a file.

    Attributes:
        tile_size: S of the input, `pixel_values` float32 [tiles, 3, S, S].
        mean, std: of each channel; the input is (value / 255 - mean) / std.
        tokens_per_tile, hidden: of the output, `visual_tokens` float32 [tiles, tokens_per_tile, hidden].
        digest: of the weights; the mmproj.gguf of the same model has the same.
    """

    tile_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens_per_tile: int
    hidden: int
    digest: str

    def texts(self) -> dict[str, str]:
        """As metadata: names and texts."""
        return {
            name: " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            for name, value in asdict(self).items()
        }

    @classmethod
    def of(cls, texts: dict[str, str], path: Path) -> "VisionFacts":
        """CheckpointError where they are not there."""
        try:
            numbers = {name: int(texts[name]) for name in ("tile_size", "tokens_per_tile", "hidden")}
            mean, std = (tuple(map(float, texts[name].split())) for name in ("mean", "std"))
            return cls(**numbers, mean=mean, std=std, digest=texts["digest"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} lacks {error}: it is no vision file of this package; export the model again"
            ) from error


class _Session(Protocol):
    facts: VisionFacts

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] -> float32 [1, tokens_per_tile, hidden]."""
        ...


class VisionFile:
    """Runs a vision file in float32, one tile in a pass: kernels are chosen by shape, and so is their rounding.

    Args:
        directory: holds a file of `FILES`.
        threads: default: the runtime's own choice.

    Raises ConfigError where the runtime is not installed, CheckpointError where the file is absent or damaged.
    """

    def __init__(self, directory: Path, runtime: Runtime, threads: int | None = None) -> None:
        self.path = directory / FILES[runtime]
        if not self.path.is_file():
            raise CheckpointError(f"no {self.path.name} in {directory}; write one with `llama3v export`")
        require_runtime(runtime)
        self._session: _Session = (_OpenVino if runtime == "openvino" else _OnnxRuntime)(self.path, threads)
        self.facts = self._session.facts

    def encode(self, tiles: Tiles) -> np.ndarray:
        """Tiles -> visual tokens float32 [tiles * tokens_per_tile, hidden]."""
        pixels = normalised(tiles.pixels, self.facts.mean, self.facts.std)
        return np.concatenate([self._session.run(tile[None])[0] for tile in pixels])


def is_installed(runtime: Runtime) -> bool:
    """Whether the runtime's module is there. Cheap."""
    return importlib.util.find_spec(runtime) is not None


def require_runtime(runtime: Runtime) -> None:
    """ConfigError, naming the extra, where the runtime is not installed."""
    if not is_installed(runtime):
        raise ConfigError(f"{runtime} is not installed: pip install 'llama3v[{runtime}]'")


def runtime_for(directory: Path) -> Runtime | None:
    """A runtime that is installed and has a file in the directory, or None."""
    return next((name for name, file in FILES.items() if (directory / file).is_file() and is_installed(name)), None)


class _OpenVino:
    def __init__(self, path: Path, threads: int | None) -> None:
        # On import OpenVINO reports to its maker that it is used, unless its telemetry package is absent. The features
        # of somebody's pictures are computed here: nothing is reported.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        try:
            model = openvino.Core().read_model(path)
            has = model.has_rt_info
            names = [field.name for field in fields(VisionFacts)]
            texts = {name: model.get_rt_info([OUR_KEYS, name]).astype(str) for name in names if has([OUR_KEYS, name])}
            self.facts = VisionFacts.of(texts, path)
            model.reshape([1, 3, self.facts.tile_size, self.facts.tile_size])
            options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            if threads is not None:
                options["INFERENCE_NUM_THREADS"] = threads
            self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise _damaged(path, error) from error

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self._request.infer([np.ascontiguousarray(pixels)], share_inputs=True)[0]


class _OnnxRuntime:
    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, RuntimeError) as error:
            raise _damaged(path, error) from error
        prefix = f"{OUR_KEYS}."
        found = self._session.get_modelmeta().custom_metadata_map
        texts = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        self.facts = VisionFacts.of(texts, path)

    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(pixels)})[0]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[-160:]
    return CheckpointError(f"{path} is damaged or cut short ({reason}); export the model again")
