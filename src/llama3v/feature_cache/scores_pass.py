"""`llama3v encode --score`: score the pairs of a data set beside the encode pass.

    the pass: which texts an image has, its features when they are there --> one thread: embed, score, commit

The image's embedding starts from its features as the cache stores them, so a score is the same whether the pass has
just computed them or finds them in the cache: nothing is encoded again. Only the rest of SigLIP's vision half runs.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from llama3v.config import EncodeConfig
from llama3v.errors import CacheError, CheckpointError
from llama3v.feature_cache.codecs import PIXELS
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.scores import ScoreWriter
from llama3v.feature_cache.scores_format import Score

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama3v.feature_cache.encode import Counts
    from llama3v.feature_cache.writer import CacheWriter
    from llama3v.model.pair_score import PairScorer
    from llama3v.model.vision import VisionTower

Embedded = TypeVar("Embedded")

TASKS_UNDER_WAY = 16
"""Images that wait for the scoring thread, at most."""
EMBEDDINGS_KEPT = 8192
"""Of images and of texts each; 5 KB each with so400m."""
SCORES_IN_FILE = 1 << 16
SECONDS_IN_FILE = 60.0
"""Scores are committed this often: what a kill costs, at most."""

_AS_THEY_ARE = ("bf16", PIXELS.name)
"""Codecs that change nothing."""


def load_scorer(config: EncodeConfig, tower: "VisionTower") -> "PairScorer":
    """The whole SigLIP of `config.vision`.

    Raises:
        CheckpointError: it has no text half.
    """
    from llama3v.model.pair_score import PairScorer
    from llama3v.model.vision import SiglipTower

    if not isinstance(tower, SiglipTower):
        raise CheckpointError(f"--score needs a SigLIP with its text half; {config.vision} is {tower.kind}")
    try:
        return PairScorer.from_pretrained(config.vision)
    except CheckpointError as error:
        raise CheckpointError(
            f"--score: {error}; give --vision the SigLIP checkpoint that the tower comes from (with --cut and --max-tiles "
            "of the cache), or leave --score away"
        ) from error


class ScoringPass:
    """Scores the pairs that one encode pass meets.

    The pass calls `met` for every readable image in the order of the data set, from one thread, and `encoded` where it
    had to encode it, from another; between the two, pairs wait for their features.

    Args:
        scorer: loaded; its trunk is forgotten here.
        cut: of the cache; 0 where it holds tiles.
        writer: of the features, or tiles.
    """

    def __init__(self, scorer: "PairScorer", cut: int, writer: "CacheWriter") -> None:
        from llama3v.feature_cache.encoders.torch import best_device

        self.codec, self._cut = writer.codec, cut
        self._scores = ScoreWriter(writer.paths, scorer.identity(cut))
        if self.codec is not PIXELS:
            scorer.forget_trunk(cut)
        self._scorer = scorer.to(best_device())
        self._reader = CacheReader(writer.paths.root, fingerprint=writer.fingerprint)
        self._images: _Recent[Tensor] = _Recent(EMBEDDINGS_KEPT)  # key -> [width]
        self._texts: _Recent[Tensor] = _Recent(EMBEDDINGS_KEPT)  # text -> [pieces, width]
        self._awaited: dict[str, list[str]] = {}  # key -> texts, of images that are being encoded
        self._lock = threading.Lock()  # of _awaited and _tasks
        self._tasks: deque[Future] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._later: list[tuple[str, Sequence[str]]] = []  # of records that are not committed yet
        self._unread: dict[str, str] = {}  # key -> why its record cannot be read
        self._committed_at = time.monotonic()

    @property
    def fingerprint(self) -> str:
        """Of the text half, and all else that the scores depend on beside the features."""
        return self._scores.paths.scorer

    @contextmanager
    def at_work(self, counts: "Counts") -> Iterator[None]:
        """While `met` and `encoded` are called, and what they do is counted. A clean end is `finish`."""
        self._counts = counts
        with ThreadPoolExecutor(1, "score") as self._pool:
            try:
                yield
            finally:
                for task in self._tasks:
                    task.cancel()
                for left in (self._tasks, self._awaited, self._later, self._unread):
                    left.clear()

    def met(self, key: str, text: str, *, to_be_encoded: bool) -> None:
        """An image of the data set, and the text of its pair. A pair that has a score is passed over."""
        self._counts.pairs += 1
        if self._scores.has(key, text):
            return
        with self._lock:
            if to_be_encoded or key in self._awaited:
                self._awaited.setdefault(key, []).append(text)
                return
        self._submit(lambda: self._score_cached(key, [text]))

    def encoded(self, key: str, parts: "Sequence[torch.Tensor]") -> None:
        """The features of an image that was to be encoded, as `CacheWriter.add` takes them, in parts."""
        with self._lock:
            texts = self._awaited.pop(key, [])
        if not texts:
            return
        if self.codec.name in _AS_THEY_ARE:
            overview = parts[0][0].clone()  # lets the memory of the batch go
            self._submit(lambda: self._score(key, self._embed(overview), texts))
        else:
            tiles = list(parts)
            self._submit(lambda: self._score(key, self._embed(self._as_stored(tiles)), texts))

    def finish(self) -> None:
        """Score what is left, and commit. The features of the pass must be committed.

        Raises:
            CacheError: a record cannot be read (the others are scored all the same), or scores cannot be written.
        """
        self._submit(self._finish)
        while self._tasks:
            self._tasks.popleft().result()
        if self._unread:
            key, reason = next(iter(self._unread.items()))
            raise CacheError(
                f"{len(self._unread)} images could not be scored, the first is {key}: {reason}. All others are; run the "
                "same command again"
            )

    def _submit(self, task: Callable[[], None]) -> None:
        assert self._pool is not None, "at work"
        with self._lock:
            while self._tasks and (len(self._tasks) >= TASKS_UNDER_WAY or self._tasks[0].done()):
                self._tasks.popleft().result()
            self._tasks.append(self._pool.submit(task))

    # From here on, in the scoring thread.

    def _score_cached(self, key: str, texts: Sequence[str]) -> None:
        embedding = self._images.get(key)
        if embedding is not None:
            self._score(key, embedding, texts)
            return
        if key not in self._reader:
            self._reader.refresh()
        if key in self._reader:
            self._score_read(key, texts)
        else:
            self._later.append((key, texts))

    def _finish(self) -> None:
        self._reader.refresh()
        later, self._later = self._later, []
        for key, texts in later:
            self._score_read(key, texts)
        self._scores.commit()

    def _score_read(self, key: str, texts: Sequence[str]) -> None:
        try:
            overview = self._reader.read(key)[0]
        except CacheError as error:  # damaged, and set aside now: the next pass encodes it anew
            self._unread[key] = str(error)
        else:
            self._score(key, self._embed(overview), texts)

    def _as_stored(self, parts: "list[torch.Tensor]") -> "Tensor":
        """The overview of new features as it is going to be read: bf16 [tokens, width]."""
        import numpy as np
        import torch

        features = torch.cat(parts)
        data = self.codec.encode(features.view(torch.uint16).numpy())
        n_tiles, tokens, width = features.shape
        return self.codec.decode(np.frombuffer(bytearray(data), np.uint8), (n_tiles, tokens, width))[0]

    def _embed(self, overview: "Tensor") -> "Tensor":
        """[width] from the overview tile: its features [patches, width], or its pixels uint8 [pixels, 3]."""
        if self.codec is PIXELS:
            side = self._scorer.tile_size
            return self._scorer.embed_tiles(overview.numpy().reshape(1, side, side, 3))[0]
        return self._scorer.embed_features(overview[None], self._cut)[0]

    def _score(self, key: str, image: "Tensor", texts: Sequence[str]) -> None:
        self._images.put(key, image)
        for text in texts:
            pieces = self._texts.get(text)
            if pieces is None:
                pieces = self._scorer.embed_texts(self._scorer.pieces(text))
                self._texts.put(text, pieces)
            value = float(self._scorer.probabilities(image[None], pieces).mean())
            if self._scores.add(key, text, Score(value, len(pieces))):
                self._counts.scored += 1
                self._counts.scored_in_pieces += len(pieces) > 1
        since = time.monotonic() - self._committed_at
        if self._scores.pending >= SCORES_IN_FILE or since > SECONDS_IN_FILE:
            self._scores.commit()
            self._committed_at = time.monotonic()


class _Recent(OrderedDict[str, Embedded]):
    """The entries that were used last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def get(self, key: str) -> Embedded | None:  # type: ignore[override]
        if key not in self:
            return None
        self.move_to_end(key)
        return self[key]

    def put(self, key: str, value: Embedded) -> None:
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)
