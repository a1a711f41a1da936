"""From rows of sample numbers to tensors: what one forward and backward pass needs, made ahead in a second thread.

A *row* holds several samples side by side. Each keeps to itself: positions restart with it, and attention is
block-diagonal (`attention_mask`). Padding at the end of a row is a block of its own, so nothing sees it.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from llama3v.data.packing import arrange, loads, pack
from llama3v.train.features.base import FeatureSource
from llama3v.train.prepared import PreparedData

ROUND_TO = 8  # tensor cores and attention kernels like lengths that 8 divides

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The rows of one pass. Flat indices count through [rows, length]."""

    ids: Tensor  # [rows, length], image_token_id at visual tokens
    positions: Tensor  # [rows, length], from 0 in every sample
    segments: Tensor  # [rows, length], 1, 2, ... per sample of a row; 0 is padding
    predict_at: Tensor  # [supervised], flat index of the position whose next token has loss
    targets: Tensor  # [supervised], that next token
    owners: Tensor  # [supervised], the sample it belongs to
    features: Tensor | None  # [tiles, patches, width], as cached, in the order of the slots
    visual_tokens: int
    text_tokens: int

    @property
    def supervised_tokens(self) -> int:
        return len(self.targets)

    @property
    def tiles(self) -> int:
        return 0 if self.features is None else len(self.features)

    @property
    def attention_pairs(self) -> int:
        """(query, key) pairs of all samples: a token sees itself and those of its sample before it."""
        return int(((self.positions + 1) * (self.segments > 0)).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same on another device; from pinned memory the copy runs beside the computation."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value.pin_memory() if device.type == "cuda" else value
                moved[field.name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a step."""

    epoch: int
    supervised_of_step: int
    batch: Batch


class RowPlan:
    """Which rows each step takes: a pure function of (seed, step). The epochs' rows follow one another without a gap.

    With several ranks, each takes its share of a step's rows; which rows the step has does not depend on their number.
    Safe to use from threads.

    Args:
        lengths: tokens of every sample.
        row_tokens: length of a row.
        rows_per_step: rows of a step, on all ranks. Their number must divide it (parallel/placement.py sees to it).
        rows_per_pass: rows of a pass on each rank (the last pass of a step may have fewer).
        tiles: of every sample; with them, steps, passes and ranks are alike in what they make to do.
        rank, ranks: this rank's number, and how many there are.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        row_tokens: int,
        rows_per_step: int,
        rows_per_pass: int,
        seed: int,
        tiles: Sequence[int] | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert rows_per_step % ranks == 0, f"{rows_per_step} rows cannot be shared out evenly among {ranks}"
        self._lengths, self._row_tokens, self._seed = list(lengths), row_tokens, seed
        self._length_array = np.asarray(self._lengths)
        self._tiles = None if tiles is None else np.asarray(tiles)
        self._rank, self._ranks = rank, ranks
        self.rows_per_step, self.rows_per_pass = rows_per_step, min(rows_per_pass, rows_per_step // ranks)
        self._lock = threading.RLock()
        self._epochs: dict[int, list[list[int]]] = {}
        self._ends: list[int] = []  # rows up to the end of each epoch that has been packed so far

    @property
    def passes_per_step(self) -> int:
        """The same on every rank."""
        return -(-self.rows_per_step // self._ranks // self.rows_per_pass)

    def epoch(self, number: int) -> list[list[int]]:
        """The rows of one pass over the data; the two that were packed last are kept."""
        with self._lock:
            if number not in self._epochs:
                if len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = pack(
                    self._lengths, self._row_tokens, seed=self._seed, epoch=number, tiles=self._tiles
                )
            return self._epochs[number]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, row in that epoch) with which a step begins."""
        row = step * self.rows_per_step
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + len(self.epoch(len(self._ends))))
        epoch = next(number for number, end in enumerate(self._ends) if row < end)
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def rows(self, step: int) -> list[list[int]]:
        """The `rows_per_step` rows of a step; they may reach into the next epoch."""
        epoch, first = self.locate(step)
        rows: list[list[int]] = []
        while len(rows) < self.rows_per_step:
            rows += self.epoch(epoch)[first : first + self.rows_per_step - len(rows)]
            epoch, first = epoch + 1, 0
        if self._tiles is None:
            return rows
        load = loads(rows, self._length_array, self._tiles).sum(axis=1)
        return [rows[index] for index in arrange(load.tolist(), self.rows_per_pass, self._ranks)]

    def share(self, rows: list[list[int]]) -> list[list[int]]:
        """Of a step's rows, those of this rank: every `ranks`-th, so that ranks have equal shares of an epoch.

        `packing.arrange` counts on it.
        """
        return rows[self._rank :: self._ranks]

    def epochs_in(self, steps: int) -> float:
        """Passes over the data that a number of steps makes."""
        epoch, row = self.locate(steps)
        return round(epoch + row / len(self.epoch(epoch)), 3)

    def steps_for(self, epochs: float) -> int:
        """Steps that show every sample at least `epochs` times (the last step is filled from the next epoch)."""
        whole, part = int(epochs), epochs - int(epochs)
        rows = float(sum(len(self.epoch(number)) for number in range(whole)))
        if part:
            rows += part * len(self.epoch(whole))
        return max(1, int(np.ceil(rows / self.rows_per_step)))


def make_pass(number: int, plan: RowPlan, data: PreparedData, source: FeatureSource, image_token_id: int) -> Pass:
    """This rank's pass of that number, counted over all steps from 0. Arguments as of `assemble`."""
    step, part = divmod(number, plan.passes_per_step)
    rows = plan.rows(step)
    some = plan.share(rows)[part * plan.rows_per_pass : (part + 1) * plan.rows_per_pass]
    return Pass(
        epoch=plan.locate(step)[0],
        supervised_of_step=sum(int(data.labels[sample]) for row in rows for sample in row),
        batch=assemble(data, some, source, image_token_id),
    )


def assemble(
    data: PreparedData,
    rows: Sequence[Sequence[int]],
    source: FeatureSource,
    image_token_id: int,
    images_of: Mapping[int, int] | None = None,
) -> Batch:
    """Lay samples side by side into rows, as long as the longest of them.

    Args:
        rows: numbers of samples, per row.
        source: gives the features of the images.
        images_of: sample -> the sample whose images it gets instead of its own (validation with shuffled images).
    """
    longest = max(sum(data.length(sample) for sample in row) for row in rows)
    shape = (len(rows), -(-longest // ROUND_TO) * ROUND_TO)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, supervised = np.zeros(shape, np.int32), np.zeros(shape, bool)
    owners = np.zeros(shape, np.int64)
    keys: list[str] = []
    for number, row in enumerate(rows):
        begin = 0
        for segment, sample in enumerate(row, start=1):
            start, length = int(data.starts[sample]), data.length(sample)
            place = (number, slice(begin, begin + length))
            ids[place] = data.tokens[start : start + length]
            supervised[place] = data.supervised[start : start + length]
            positions[place] = np.arange(length)
            segments[place] = segment
            owners[place] = sample
            keys += data.images(sample if images_of is None else images_of.get(sample, sample))
            begin += length
    # hidden state i predicts token i + 1; a sample's first token has no loss, so this never crosses samples
    labelled = np.flatnonzero(supervised)
    visual = int((ids == image_token_id).sum())
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        predict_at=torch.from_numpy(labelled - 1),
        targets=torch.from_numpy(ids.reshape(-1)[labelled]),
        owners=torch.from_numpy(owners.reshape(-1)[labelled]),
        features=source.features(keys) if keys else None,
        visual_tokens=visual,
        text_tokens=int((segments > 0).sum()) - visual,
    )


def attention_mask(segments: Tensor) -> Tensor:
    """Block-diagonal and causal: [rows, length] -> bool [rows, 1, length, length], True where a query may look.

    Padding (segment 0) sees padding only, itself included: no row of the softmax is empty, so nothing becomes NaN.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


class Ahead(Generic[T]):
    """Calls `make(number)` for first, first + 1, ... in a second thread, a few ahead of who asks, in order."""

    def __init__(self, make: Callable[[int], T], numbers: range, ahead: int = 2) -> None:
        self._make, self._numbers = make, iter(numbers)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._waiting: deque[Future[T]] = deque()
        self.waited = 0.0
        """Seconds that `next` has waited so far."""
        for _ in range(ahead):
            self._submit()

    def next(self) -> T:
        """The next one; raises what `make` raised."""
        begun = perf_counter()
        result = self._waiting.popleft().result()
        self.waited += perf_counter() - begun
        self._submit()
        return result

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        number = next(self._numbers, None)
        if number is not None:
            self._waiting.append(self._pool.submit(self._make, number))
