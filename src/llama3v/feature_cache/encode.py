"""The encode pass: run the trunk of the vision tower once over every image of a data set, and keep its features.

    source -> pipeline.py: read, hash, decode, cut, batch -> encoders/: the tower -> a writing thread: CacheWriter

What stands before and after the tower runs in threads of its own, so that the tower never waits for it. Run again after anything: what is committed is not encoded again.
"""

import json
import operator
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama3v.config import MAX_TILES, EncodeConfig
from llama3v.data.ledger import Ledger
from llama3v.data.pairs import texts_of
from llama3v.data.sources import ImageRef, Rejected, Source, open_source
from llama3v.errors import CacheError
from llama3v.feature_cache.codecs import PIXELS
from llama3v.feature_cache.commit import publish
from llama3v.feature_cache.layout import CachePaths, manifest_of
from llama3v.feature_cache.pipeline import Batch, Picture, Preparer, Unreadable, make_batches, one_ahead
from llama3v.feature_cache.progress import EncodeProgress
from llama3v.feature_cache.refs import RefsWriter
from llama3v.feature_cache.writer import CacheWriter

if TYPE_CHECKING:
    import torch

    from llama3v.feature_cache.encoders.base import TrunkEncoder
    from llama3v.feature_cache.scores_pass import ScoringPass
    from llama3v.model.vision import VisionTower

EARLIEST_STOP = 100
"""Images after which the share of bad ones is judged for the first time; at the end it is judged in any case."""
REFS_BETWEEN_FLUSHES = 1000
WRITES_UNDER_WAY = 64
"""Images whose features wait for the writing thread, at most."""


def encode(config: EncodeConfig) -> dict[str, Any]:
    """Run the vision tower over a data set and commit its features to the cache.

    Returns:
        The summary, which is also written to <out>/summary.json: counts of samples and images, tiles and tiles per
        second (over the whole loop without `opening_seconds`, which preparing and checking the engine took),
        wait_share (the share of that time in which the tower did not compute), bytes, fingerprint, and the engine, its
        device and precision (none where nothing was left to encode). With --score, pairs that were met and scored.

    Raises:
        ConfigError: the engine is not installed, or does not compute this tower's features.
        CheckpointError: no such tower; with --score, no text half.
        DataError: the data set cannot be opened, or too many of its images are bad.
        CacheError: the cache cannot be written, or features are not finite.
        KeyboardInterrupt: stopped by SIGINT or SIGTERM, after committing what was complete.
    """
    from llama3v.feature_cache.encoders.choose import require_engine

    require_engine(config.engine)
    if config.follow:
        from llama3v.feature_cache.ring.follow import follow

        return follow(config)
    if config.ray_workers:
        from llama3v.feature_cache.ray_adapter import encode_with_ray

        return encode_with_ray(config)
    encoding = open_pass(config, open_source(config.data, config.limit, config.part))
    with encoding.writer, sigterm_as_interrupt():
        encoding.run()
    return finish(config, encoding.source, encoding.summary())


def open_pass(config: EncodeConfig, source: Source, ledger: Ledger | None = None) -> "EncodePass":
    """Load the tower and open the cache for one source. `ledger`: where to note what is left out (default: the run's).

    Raises as `encode`.
    """
    from llama3v.feature_cache.scores_pass import ScoringPass, load_scorer
    from llama3v.model.vision import load_tower

    max_tiles = _max_tiles(config)
    tower = load_tower(config.vision, cut=config.cut)
    scorer = load_scorer(config, tower) if config.score else None
    pixels = config.mode == "pixels"
    manifest = manifest_of(
        {} if pixels else tower.fingerprint(),
        tile_size=tower.tile_size,
        max_tiles=max_tiles,
        codec=PIXELS.name if pixels else config.codec,
    )
    writer = CacheWriter(config.cache, manifest, shard_bytes=config.shard_mb << 20)
    ledger = ledger or Ledger(out_of(config, writer.paths, source) / "ledger.jsonl")
    scoring = None if scorer is None else ScoringPass(scorer, 0 if pixels else tower.cut, writer)
    return EncodePass(config, max_tiles, source, tower, writer, ledger, scoring)


def out_of(config: EncodeConfig, paths: CachePaths, source: Source) -> Path:
    """Directory of the summary and the ledger."""
    return config.out or paths.directory / "runs" / source.name


def finish(config: EncodeConfig, source: Source, summary: dict[str, Any]) -> dict[str, Any]:
    """Complete, write and print the summary of a pass."""
    paths = CachePaths(config.cache, summary["fingerprint"])
    out = out_of(config, paths, source)
    summary = {"data": config.data, "source": source.digest, "vision": config.vision} | summary
    write_summary(out / "summary.json", summary)
    print(_in_words(summary, paths.directory, out))
    return summary


@dataclass
class Counts:
    """What a pass has met so far."""

    samples: int = 0
    images: int = 0
    encoded: int = 0
    already_cached: int = 0
    duplicates: int = 0
    """Images whose bytes were met before in this pass."""
    left_out: int = 0
    """Images that cannot be used, and rows that cannot be understood."""
    left_out_rows: int = 0
    tiles: int = 0
    tower_seconds: float = 0.0
    """Spent in the engine's `encode`, with moving tiles to its device and features from it."""
    opening_seconds: float = 0.0
    """Spent on preparing, checking and choosing the engine, before the first batch."""
    pairs: int = 0
    """Of an image and a text; counted with --score only."""
    scored: int = 0
    """Pairs that had no score before."""
    scored_in_pieces: int = 0
    """Of them, those whose text is longer than the text half reads."""

    def tiles_per_second(self, seconds: float) -> float:
        """Tiles per second of a pass that has taken `seconds`."""
        return self.tiles / max(seconds - self.opening_seconds, 1e-9)

    def wait_share(self, seconds: float) -> float:
        """Share of that time in which the tower did not compute; 0 where it had nothing to do, as in mode pixels."""
        working = max(seconds - self.opening_seconds, 1e-9)
        return max(0.0, 1 - self.tower_seconds / working) if self.tower_seconds else 0.0


class EncodePass:
    """One pass over one source."""

    def __init__(
        self,
        config: EncodeConfig,
        max_tiles: int,
        source: Source,
        tower: "VisionTower",
        writer: CacheWriter,
        ledger: Ledger,
        scoring: "ScoringPass | None" = None,
    ) -> None:
        self.config, self.source, self.writer, self.ledger = config, source, writer, ledger
        self.scoring = scoring
        self.tower: VisionTower | None = tower  # until the engine has it
        self.encoder: TrunkEncoder | None = None  # until there is something to encode
        self.refs = RefsWriter(writer.paths.refs(source.digest))
        self.counts = Counts()
        self.seconds = 0.0
        self.progress = EncodeProgress(self.counts, source.name, operator.length_hint(source) or None)
        self.preparer = Preparer(
            self._is_known, tower.tile_size, max_tiles, depth=2 * config.batch_tiles, workers=decoding_threads()
        )
        self._met: set[bytes] = set()  # keys of this pass, 16 bytes each
        self._bad: dict[str, str] = {}  # key -> reason
        self._writing: deque[Future] = deque()
        self._parts: list[torch.Tensor] = []  # features of the picture that the last batch cut off
        self._due: deque[str] = deque()  # texts of the images under way, in order
        self._stopping = False

    def run(self) -> None:
        """Encode everything. Whatever stops it, what is complete is committed."""
        self._stopping = False
        self._due.clear()
        started = time.perf_counter()
        scoring = self.scoring.at_work(self.counts) if self.scoring else nullcontext()
        with ThreadPoolExecutor(1, "write") as pool, scoring, self.progress:
            try:
                with self._batches() as batches:
                    for batch in batches:
                        self._hand_over(pool, batch, self._features(batch))
                        self.progress.update()
                self._check_ratio()
            except CacheError:  # of the writer, which would fail again
                for write in self._writing:
                    write.cancel()
                raise
            except KeyboardInterrupt:
                self._finish()
                raise KeyboardInterrupt(
                    f"{self.counts.encoded:,} images of this run are encoded and committed; "
                    "run the same command to go on"
                ) from None
            except BaseException:
                self._finish()
                raise
            self._finish()
            self.progress.update()
        self.seconds = time.perf_counter() - started

    def summary(self) -> dict[str, Any]:
        """The counts and what follows from them."""
        counts, seconds = self.counts, max(self.seconds, 1e-9)
        return asdict(counts) | {
            "seconds": self.seconds,
            "images_per_second": counts.images / seconds,
            "tiles_per_second": counts.tiles_per_second(seconds),
            "wait_share": counts.wait_share(seconds),
            "bytes": self.writer.committed_bytes,
            "records_in_cache": len(self.writer),
            "fingerprint": self.writer.fingerprint,
            "engine": self.encoder.name if self.encoder else None,
            "device": self.encoder.device if self.encoder else None,
            "precision": self.encoder.precision if self.encoder else None,
            "codec": self.writer.codec.name,
            "scored_by": self.scoring.fingerprint if self.scoring else None,
            "shards_set_aside": dict(self.writer.set_aside),
        }

    @contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        """The batches, each put together while the one before it is encoded."""
        with closing(make_batches(self._pictures(), self.config.batch_tiles)) as batches, one_ahead(batches) as ready:
            try:
                yield ready
            finally:
                self._stopping = True  # where all is known, looking for the next batch may take hours

    def _images(self) -> Iterator[tuple[str, ImageRef]]:
        """(sample id, image) of every image of the source."""
        for row in self.source:
            self.counts.samples += 1
            if isinstance(row, Rejected):
                self.counts.left_out += 1
                self.counts.left_out_rows += 1
                self.ledger.leave_out(row.id, row.reason)
                self._check_ratio(early=True)
            else:
                if self.scoring:
                    self._due.extend(texts_of(row))
                yield from ((row.id, image) for image in row.images)

    def _is_known(self, key: str) -> bool:
        short = bytes.fromhex(key)
        if short in self._met:
            self.counts.duplicates += 1
        elif key in self.writer:
            self.counts.already_cached += 1
        else:
            self._met.add(short)
            return False
        return True

    def _pictures(self) -> Iterator[Picture]:
        """The pictures that the tower must see; what is to be noted about all images is noted here."""
        for outcome in self.preparer.outcomes(self._images()):
            if self._stopping:
                return
            text = self._due.popleft() if self.scoring else ""
            self.counts.images += 1
            if self.counts.images % self.config.batch_tiles == 0:
                self.progress.update()  # also where nothing needs encoding
            if isinstance(outcome, Unreadable):
                self._leave_out(outcome)
            elif outcome.key in self._bad:  # the same bytes again
                self._leave_out(Unreadable(outcome.sample, outcome.name, outcome.key, self._bad[outcome.key]))
            else:
                if self.refs.add(outcome.name, outcome.key) >= REFS_BETWEEN_FLUSHES:
                    self._flush_refs()
                if self.scoring and text:
                    self.scoring.met(outcome.key, text, to_be_encoded=isinstance(outcome, Picture))
                if isinstance(outcome, Picture):
                    yield outcome

    def _leave_out(self, image: Unreadable) -> None:
        self.counts.left_out += 1
        if image.key:
            self._bad[image.key] = image.reason
        self.ledger.leave_out(image.sample, image.reason, image=image.name)
        self.writer.quarantine(image.name, image.reason)
        self._check_ratio(early=True)

    def _check_ratio(self, early: bool = False) -> None:
        total = self.counts.images + self.counts.left_out_rows
        if not early or total >= EARLIEST_STOP:
            self.ledger.check_ratio(total, self.config.max_bad_ratio)

    def _features(self, batch: Batch) -> "torch.Tensor":
        """bf16 [batch_tiles, patches, width], on the CPU."""
        if self.encoder is None:
            self.encoder = self._open_encoder()
        started = time.perf_counter()
        features = self.encoder.encode(batch.tiles)
        if self.config.mode == "features":
            self.counts.tower_seconds += time.perf_counter() - started
        return features

    def _open_encoder(self) -> "TrunkEncoder":
        from llama3v.feature_cache.encoders.choose import open_encoder
        from llama3v.feature_cache.encoders.pixels import PixelEncoder

        if self.config.mode == "pixels":
            assert self.tower is not None, "it says how large tiles are"
            return PixelEncoder(self.tower)
        started = time.perf_counter()
        self.progress.note = "preparing the engine"
        self.progress.update()
        assert self.tower is not None, "one engine is opened"
        encoder = open_encoder(
            self.config.engine, self.tower, precision=self.config.precision, batch_tiles=self.config.batch_tiles
        )
        self.tower = None  # an engine may have weights of its own
        self.progress.note = ""
        self.counts.opening_seconds = time.perf_counter() - started
        return encoder

    def _hand_over(self, pool: ThreadPoolExecutor, batch: Batch, features: "torch.Tensor") -> None:
        """Give the features of every picture that is now complete to the writing thread."""
        position = 0
        for picture, count in batch.pieces:
            self._parts.append(features[position : position + count])
            position += count
            n_tiles = len(picture.tiles.pixels)
            if sum(len(part) for part in self._parts) == n_tiles:
                parts, self._parts = self._parts, []
                if self.scoring:
                    self.scoring.encoded(picture.key, parts)
                self._writing.append(pool.submit(self._write, picture, parts))
                self.counts.encoded += 1
                self.counts.tiles += n_tiles
        while self._writing and (len(self._writing) > WRITES_UNDER_WAY or self._writing[0].done()):
            self._writing.popleft().result()

    def _write(self, picture: Picture, parts: "list[torch.Tensor]") -> None:
        import torch

        self.writer.add(picture.key, torch.cat(parts), picture.tiles.grid, picture.name)

    def _finish(self) -> None:
        while self._writing:
            self._writing.popleft().result()
        self.writer.commit()
        self._flush_refs()
        if self.scoring:
            self.scoring.finish()

    def _flush_refs(self) -> None:
        try:
            self.refs.flush()
        except OSError as error:
            raise CacheError(
                f"cannot write {self.refs.path} ({error.strerror}); mend that and run the same command again"
            ) from error


def _max_tiles(config: EncodeConfig) -> int:
    """The option; without it what a Llama 3-V model directory has, or a new model."""
    if config.max_tiles is not None:
        return config.max_tiles
    path = Path(config.vision) / "config.json"
    model = json.loads(path.read_bytes()) if path.is_file() else {}
    return model["max_tiles"] if model.get("model_type") == "llama3v" else MAX_TILES


def decoding_threads() -> int:
    """Threads that decode images."""
    return min(8, os.cpu_count() or 1)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM (a batch system or a spot machine wants its CPU back) stops the pass as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Raises CacheError where it cannot be written."""
    try:
        with publish(path, [json.dumps(summary, indent=2).encode() + b"\n"], "summary"):
            pass
    except OSError as error:
        raise CacheError(
            f"the features are committed, but {path} cannot be written ({error.strerror}); mend that and run the "
            "same command again"
        ) from error


def _in_words(summary: dict[str, Any], directory: Path, out: Path) -> str:
    words = [
        f"{summary['images']:,} images: {summary['encoded']:,} encoded "
        f"({summary['tiles']:,} tiles, {summary['tiles_per_second']:,.1f} tiles/s, "
        f"{summary['wait_share']:.0%} waiting), {summary['already_cached']:,} were cached, "
        f"{summary['duplicates']:,} duplicates"
    ]
    if summary["scored_by"]:
        words.append(f"{summary['pairs']:,} pairs, {summary['scored']:,} of them scored now")
    if summary["left_out"]:
        words.append(f"{summary['left_out']:,} left out (reasons: {out / 'ledger.jsonl'})")
    for shard, reason in summary["shards_set_aside"].items():
        words.append(f"shard {shard} was damaged and is set aside ({reason})")
    return "; ".join([*words, f"cache: {directory}"])
