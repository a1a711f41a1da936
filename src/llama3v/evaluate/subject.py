"""What is measured: a model on one of our engines, or an endpoint; and how it is shown a picture."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import EvalConfig
from llama3v.data.sources.base import ImageRef
from llama3v.engines.base import BatchEngine, EngineImage, ImageFeatures
from llama3v.engines.terminal import at_detail, open_engine
from llama3v.errors import ConfigError
from llama3v.evaluate.sight import OVERVIEW
from llama3v.model.slicing import Grid
from llama3v.model.tiles import decode_image, image_key

if TYPE_CHECKING:
    from llama3v.feature_cache.reader import CacheReader

WEIGHTS = ("*.safetensors", "*.gguf")
_BLOCKS, _BLOCK = 64, 1 << 16


@dataclass
class Pictures:
    """Shows an engine an image: as it is, from a feature cache, or its overview alone.

    Attributes:
        from_cache: how many times the cache gave the features.
    """

    engine: BatchEngine
    cache: "CacheReader | None" = None
    overview: bool = False
    from_cache: int = field(default=0, init=False)

    def show(self, image: ImageRef, condition: str) -> EngineImage:
        """What the engine is given under a condition. Raises ImageError; CacheError for a damaged record."""
        data = image.read()
        overview = self.overview or condition == OVERVIEW
        if self.cache is not None and (key := image_key(data)) in self.cache:
            self.from_cache += 1
            features, grid = self.cache.read(key), self.cache.record(key).grid
            # Tiles go through the tower one by one, so the overview's features are the same with slices beside it.
            return ImageFeatures(features[:1], Grid(1, 1)) if overview else ImageFeatures(features, grid)
        return at_detail(decode_image(data), "low", self.engine) if overview else data


@dataclass(frozen=True)
class Subject:
    """`identity` is what its answers depend on: two runs with the same one can be one run."""

    engine: BatchEngine
    pictures: Pictures
    identity: dict[str, Any]


def open_subject(config: EvalConfig, engine: BatchEngine | None = None) -> Subject:
    """Raises CheckpointError for a model that cannot be loaded, ConfigError for options that do not fit it, CacheError.

    Args:
        engine: runs the model, instead of one that is opened here.
    """
    if config.url is not None:
        from llama3v.engines.api import ApiEngine

        remote = ApiEngine(config.url, str(config.api_model), detail=config.detail, parallel=config.batch)
        identity = {"engine": "api", "url": config.url, "model": config.api_model, "detail": config.detail}
        return Subject(remote, Pictures(remote), identity)
    model = str(config.model)
    engine = engine or open_engine(model)
    name = {"TorchEngine": "torch", "LlamaCppEngine": "llama.cpp"}.get(type(engine).__name__, type(engine).__name__)
    overview = config.detail == "low"
    if config.detail is not None:
        _refuse_without_slices(model, engine)
    cache = None if config.cache is None else _open_cache(config.cache, engine)
    weights = model_digest(_directory(model))
    # An older run's answers are worth keeping whether or not the features came from a cache of the same tower.
    identity = {"engine": name, "model": model, "weights": weights, "detail": "low" if overview else None}
    return Subject(engine, Pictures(engine, cache, overview), identity)


def model_digest(directory: Path | None) -> str | None:
    """A digest of a model's weights, config and tokenizer: of samples of large files, so that 16 GB take no time.

    Training moves every weight, so 64 blocks of a file tell two trainings apart. None without a directory.
    """
    if directory is None or not directory.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    files = [
        path for pattern in (*WEIGHTS, "config.json", "tokenizer.json") for path in sorted(directory.glob(pattern))
    ]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(min(_BLOCKS, -(-size // _BLOCK))):
                file.seek(number * size // _BLOCKS if size > _BLOCKS * _BLOCK else number * _BLOCK)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _directory(model: str) -> Path | None:
    """Where the files of a loaded model lie; a hub name's have been downloaded."""
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _refuse_without_slices(model: str, engine: BatchEngine) -> None:
    from llama3v.engines.llamacpp import LlamaCppEngine
    from llama3v.engines.torch import TorchEngine

    slices = None
    if isinstance(engine, TorchEngine):
        slices = engine.model.config.max_tiles
    elif isinstance(engine, LlamaCppEngine):
        slices = engine.vision.max_tiles
    if slices is not None and slices < 2:
        raise ConfigError(f"{model} was trained on overviews alone (max_tiles {slices}); leave --detail away")


def _open_cache(root: Path, engine: BatchEngine) -> "CacheReader":
    from llama3v.engines.torch import TorchEngine
    from llama3v.feature_cache.layout import manifest_of
    from llama3v.feature_cache.reader import CacheReader

    if not isinstance(engine, TorchEngine):
        raise ConfigError("--cache needs a Llama 3-V model directory: only the torch engine has the cache's tower")
    tower, slices = engine.model.vision, engine.model.config.max_tiles
    return CacheReader(root, manifest_of(tower.fingerprint(), tile_size=tower.tile_size, max_tiles=slices))
