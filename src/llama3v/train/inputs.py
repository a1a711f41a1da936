"""What a run reads: the source of features, and the prepared samples to train on and to validate with."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llama3v.config import EncodeConfig, PretrainConfig, TrainConfig
from llama3v.data.sources.base import AddressableSource, open_source
from llama3v.errors import RankError
from llama3v.feature_cache.layout import CachePaths, fingerprint_of, manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.ring.files import RingPaths, TrainerSide
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.prompt import Renderer
from llama3v.train.checkpoint import Checkpoint
from llama3v.train.dataset import Preparation, prepare
from llama3v.train.features.base import FeatureSource
from llama3v.train.features.cached import CachedFeatures
from llama3v.train.features.live import LiveTrunk
from llama3v.train.features.pixels import PixelFeatures
from llama3v.train.features.ring import RingFeatures, RingTask
from llama3v.train.features.streamed import StreamedFeatures
from llama3v.train.locations import locate_in
from llama3v.train.pair_filter import PairFilter, open_filter
from llama3v.train.prepared import PreparedData, load_prepared
from llama3v.train.resume import refuse_drift, tokenizer_digest
from llama3v.train.samples import Questions
from llama3v.train.validation import Validation

BROKEN = "broken-images.jsonl"

Model = Llama3VForConditionalGeneration


@dataclass(frozen=True)
class Inputs:
    """See above; `validation` is None where there is nothing to validate with. `questions`: whose answers are shown."""

    data: PreparedData
    validation: Validation | None
    questions: Questions


def open_inputs(
    config: TrainConfig,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    source: FeatureSource,
    checkpoint: Checkpoint | None,
    encode_options: Sequence[str],
    *,
    prepared_already: bool = False,
) -> Inputs:
    """Prepare the data, or take what an earlier part of the run prepared.

    Args:
        source: as `open_features` opened it.
        checkpoint: of the run that is continued: with other data it is refused.
        encode_options: with which `llama3v encode` runs this model's tower, for messages.
        prepared_already: by rank 0, a moment ago.

    Raises what `open_source` and `prepare` do; CheckpointError.
    """
    training = _preparation(
        config, model, tokenizer, source, config.data, config.limit, encode_options, _open_filter(config, model, source)
    )
    if checkpoint is not None:  # before anything in `out` is touched
        before = checkpoint.state["identity"]["made_from"]
        refuse_drift({"made_from": before}, {"made_from": training.identity}, config.out)
    take = _taken_from_main if prepared_already else partial(prepare, keep=checkpoint is not None)
    prepared = [(take(training, config.out / "prepared" / "training", config.out / "ledger.jsonl"), training)]
    if config.validation is not None:
        held_out = _preparation(
            config, model, tokenizer, source, (config.validation,), config.validation_samples, encode_options
        )
        ledger = config.out / "ledger-validation.jsonl"
        prepared.append((take(held_out, config.out / "prepared" / "validation", ledger), held_out))
    if source.needs_files:
        source.open_files(
            locate_in([(data.locations, made.sources, made.names) for data, made in prepared if data.locations])
        )
    validation = None
    if config.validation is not None:
        validation = Validation(prepared[1][0], source, config.row_tokens, config.rows_per_pass)
    asked, made = prepared[-1]  # held out, if there are any
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    bf16 = config.precision == "bf16"
    questions = Questions(asked, source, made.sources, made.renderer.stop_ids, decode, bf16=bf16)
    return Inputs(prepared[0][0], validation, questions)


def _taken_from_main(preparation: Preparation, directory: Path, ledger: Path) -> PreparedData:
    """What rank 0 has just prepared."""
    found = load_prepared(directory, preparation.identity, with_locations=preparation.with_locations)
    if found is None:
        raise RankError(
            f"process 0 prepared the data in {directory}, but it is not there for this one, or is other data; give all "
            "machines the same data sets, and an --out on a file system that they share"
        )
    return found


@contextmanager
def entered_ring(config: TrainConfig) -> Iterator[TrainerSide | None]:
    """Have the ring that the run asks for, if it does, from before the model is loaded on: so encoders know that it comes.

    Raises CacheError where another training has it.
    """
    if config.ring is None:
        yield None
        return
    assert config.cache is not None, "the config was validated"
    side = TrainerSide(RingPaths(config.cache, config.ring))
    side.enter()
    try:
        yield side
    finally:
        side.leave()


def open_features(config: TrainConfig, model: Model, ring: TrainerSide | None) -> FeatureSource:
    """The source of features that `--mode` and `--ring` ask for.

    Args:
        model: still on the CPU, in fp32.
        ring: as `entered_ring` gave it.

    Raises:
        CacheError: the cache is not there, foreign or damaged.
    """
    vision, max_tiles = model.vision, model.config.max_tiles
    cut = {"tile_size": vision.tile_size, "max_tiles": max_tiles}
    if ring is not None:
        return _open_ring(config, model, ring)
    if config.mode == "features":
        assert config.cache is not None, "the config was validated"
        return CachedFeatures(
            CacheReader(config.cache, manifest=manifest_of(vision.fingerprint(), **cut, codec=config.codec))
        )
    fingerprint = fingerprint_of(
        manifest_of(vision.fingerprint(), **cut, codec="bf16")
    )  # to which live ones are rounded
    if config.mode == "pixels":
        assert config.cache is not None, "the config was validated"
        tiles = CacheReader(config.cache, manifest=manifest_of({}, **cut, codec="u8"))
        return PixelFeatures(tiles, LiveTrunk(vision, config.precision), vision.tile_size, fingerprint)
    return StreamedFeatures(LiveTrunk(vision, config.precision), config.out / BROKEN, **cut, fingerprint=fingerprint)


def _open_ring(config: TrainConfig, model: Model, side: TrainerSide) -> RingFeatures:
    vision, codec = model.vision, config.codec or EncodeConfig.codec
    task = RingTask(
        data=(*config.data, *([] if config.validation is None else [config.validation])),
        vision=config.vision if isinstance(config, PretrainConfig) else getattr(config, "model", ""),
        cut=vision.cut,
        tile_size=vision.tile_size,
        max_tiles=model.config.max_tiles,
        codec=codec,
        tokens=vision.grid_side**2,
        width=vision.width,
    )
    manifest = manifest_of(vision.fingerprint(), tile_size=task.tile_size, max_tiles=task.max_tiles, codec=codec)
    return RingFeatures(side, task, manifest, config.out / BROKEN)


def _open_filter(config: TrainConfig, model: Model, source: FeatureSource) -> PairFilter | None:
    """Held-out data are not filtered: losses of runs with different thresholds stay comparable."""
    if config.cache is None:
        return None
    fingerprint = source.fingerprint
    if config.mode == "pixels":
        tile_size, max_tiles = model.vision.tile_size, model.config.max_tiles
        fingerprint = fingerprint_of(manifest_of({}, tile_size=tile_size, max_tiles=max_tiles, codec="u8"))
    return open_filter(config, CachePaths(config.cache, fingerprint))


def encode_command(config: TrainConfig, data: str, encode_options: Sequence[str]) -> str:
    """The command that fills the cache with a data set for this run."""
    return shlex.join(["llama3v", "encode", "--data", data, *encode_options, "--cache", str(config.cache)])


def _preparation(
    config: TrainConfig,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    source: FeatureSource,
    names: tuple[str, ...],
    limit: int | None,
    encode_options: Sequence[str],
    pair_filter: PairFilter | None = None,
) -> Preparation:
    tokens, prompt_format = model.tokens_per_tile, model.config.prompt_format
    sources: list[AddressableSource] = [open_source(name, limit) for name in names]
    made_from: dict[str, Any] = {
        "tokenizer": tokenizer_digest(tokenizer),
        "prompt_format": prompt_format,
        "tokens_per_tile": tokens,
        "cache": source.fingerprint,
        "limit": limit,
    }
    return Preparation(
        sources=sources,
        names=names,
        lookup=source.lookup,
        renderer=Renderer(tokenizer, prompt_format, tokens, model.config.image_token_id),
        row_tokens=config.row_tokens,
        made_from=made_from,
        max_bad_ratio=config.max_bad_ratio,
        encode_command=lambda data: encode_command(config, data, encode_options),
        with_locations=source.needs_files,
        pair_filter=pair_filter,
        refuse_too_long=config.too_long == "error",
    )
