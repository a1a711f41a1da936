"""The vision half of a GGUF pair. No torch here: where the pair has a vision file, `ask` never imports it.

    mmproj.gguf                says what the model is: its prompt, its tiles
    vision.xml or vision.onnx  runs it, in OpenVINO or ONNX Runtime (engines/vision_file.py)

A pair without them, and features out of a cache, run in torch out of mmproj.gguf's weights (engines/gguf_torch.py).
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama3v.engines.base import ImageFeatures
from llama3v.engines.gguf_fields import read_fields
from llama3v.engines.vision_file import FILES, VisionFile, runtime_for
from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.tiles import Tiles

if TYPE_CHECKING:
    from llama3v.engines.gguf_torch import TorchVision


class GgufVision:
    """Tower and projector of a pair that `llama3v export` wrote; the first image opens what runs them.

    Args:
        path: mmproj.gguf.
        tower: "openvino" or "onnxruntime": that runtime, out of the pair's vision file where it is there; "torch" or
            another name of feature_cache/encoders: out of mmproj.gguf. Default: a vision file whose runtime is
            installed, else mmproj.gguf on OpenVINO where it is installed, else on torch. In float32.

    Raises CheckpointError for another kind of file, a damaged one, or a vision file of another model.
    """

    def __init__(self, path: Path, tower: str | None = None) -> None:
        self._path, self._tower = path, tower
        self._fields = read_fields(path)
        try:
            self.prompt_format = str(self._fields["llama3v.prompt_format"])
            self.image_token_id, self.max_tiles, r = (
                int(self._fields[f"llama3v.{key}"]) for key in ("image_token_id", "max_tiles", "scale_factor")
            )
            self.hidden, self.tile_size, patch, width = (
                int(self._fields[f"clip.vision.{key}"])
                for key in ("projection_dim", "image_size", "patch_size", "embedding_length")
            )
        except KeyError as error:
            raise CheckpointError(
                f"{path} lacks {error}: it is no mmproj.gguf of this package; export the model with --format gguf"
            ) from error
        self.tokens_per_tile = (self.tile_size // patch // r) ** 2
        self.feature_shape = ((self.tile_size // patch) ** 2, width)

    def open(self) -> None:
        """Open what runs the tower, before the first image needs it."""
        _ = self._runs

    def encode(self, tiles: Tiles) -> np.ndarray:
        """Tiles -> visual tokens float32 [tiles * tokens_per_tile, hidden]."""
        return self._runs.encode(tiles)

    def project(self, image: ImageFeatures) -> np.ndarray:
        """Features at the cut [tiles, *feature_shape] -> visual tokens."""
        return self._torch.project(image)

    @property
    def runs_on(self) -> str:
        """What runs the tower: a runtime of vision files, or "torch"."""
        name = self._file_runtime()
        return name or "torch"

    @cached_property
    def _runs(self) -> "VisionFile | TorchVision":
        runtime = self._file_runtime()
        if runtime is None:
            return self._torch
        file = VisionFile(self._path.parent, runtime)
        if file.facts.digest != self._fields.get("llama3v.vision_digest"):
            raise CheckpointError(
                f"{file.path.name} and {self._path.name} in {self._path.parent} are of different models; use the files "
                "of one export"
            )
        return file

    @cached_property
    def _torch(self) -> "TorchVision":
        from llama3v.engines.gguf_torch import TorchVision

        return TorchVision(self._path, self._fields, _reader(self._path), self._tower)

    def _file_runtime(self) -> Any:
        folder = self._path.parent
        if self._tower is None:
            return runtime_for(folder)
        return self._tower if self._tower in FILES and (folder / FILES[self._tower]).is_file() else None


def _reader(path: Path) -> Any:
    """gguf.GGUFReader of a GGUF file."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading GGUF needs an extra: pip install 'llama3v[llamacpp]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); export the model again") from error
