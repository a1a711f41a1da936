"""Packing: samples of different length into rows of one length, nearly without padding.

Best fit decreasing (Johnson 1974) fills rows well, but it would pair the same lengths, and so the same samples, in
every epoch. Two things keep who meets whom random at a cost of 1% of a row: the epoch's order is cut into windows
that are packed one by one, and "decreasing" goes by coarse classes of length, shuffled inside. The rows are then
shuffled over the whole epoch.

Rows are nearly equal in tokens, and so is most of their work. What remains is tiles (each passes the vision top and the
projector, or the whole tower in modes pixels and stream) and attention, which grows with the square of a sample's length.
`even_out` orders rows so that neighbours make up for each other, so that steps are alike; `arrange` shares the rows of
one step out among ranks and passes, so that none waits for another. No row is changed: tokens bound its tiles already.

Where a row holds only a few samples of nearly one length, no packing is tight (7-tile images of 600 tokens in rows
of 1,024: one each): choose `row_tokens` as a multiple of what is common in the data.
"""

from collections.abc import Sequence

import numpy as np

from llama3v.data.order import epoch_order
from llama3v.errors import DataError

VERSION = 2  # of the order that comes out: a checkpoint of another one cannot be continued
WINDOW = 2048  # samples packed together; twice as many gain less than half a percent of a row (measured)
CANDIDATES = (
    64  # rows out of which `even_out` takes the next; with half as many, steps differ by half as much again (measured)
)
CLASSES = 16  # classes of length; twice as many gain 0.2% of a row and double the neighbours that meet again


def pack(
    lengths: Sequence[int], row_tokens: int, *, seed: int, epoch: int, tiles: Sequence[int] | np.ndarray | None = None
) -> list[list[int]]:
    """Distribute samples over rows.

    Args:
        lengths: tokens of each sample, visual tokens included. tiles: of each sample; with them, rows come in an order
            that evens out their work.
        row_tokens: length of a row.
        seed, epoch: decide which samples meet in a row and the order of rows and samples; nothing else does.

    Returns rows of indices into `lengths`: every sample once, each row's sum at most `row_tokens`.
    O(n log n) for a given `row_tokens`. Raises DataError for a sample that is empty or longer than a row.
    """
    lengths = [int(length) for length in lengths]  # numpy's integers cannot shift the long ones used below
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise DataError(
                f"sample {index}: expected 1 to {row_tokens} tokens (--row-tokens), found {length}; "
                "leave it out or take longer rows"
            )
    order = epoch_order(seed, epoch, len(lengths))
    rows: list[list[int]] = []
    count = -(-len(order) // WINDOW)  # equal windows: a short last one would not fill its rows
    for part in range(count):
        members = order[len(order) * part // count : len(order) * (part + 1) // count]
        rows += _best_fit_decreasing(members, lengths, row_tokens)
    # another stream than the samples' order: the top bit of the seed's word is turned over
    shuffled = [rows[index] for index in epoch_order(seed ^ 2**63, epoch, len(rows))]
    return shuffled if tiles is None else [shuffled[index] for index in even_out(loads(shuffled, lengths, tiles))]


def _best_fit_decreasing(members: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Long samples first, each into the fullest row that still has room; a new row where none has."""
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = {}  # free tokens -> rows with just that many
    free_values = 0  # bit f is set where rows_with[f] is not empty: finding the best fit is one shift
    place = {sample: position for position, sample in enumerate(members)}
    step = -(-row_tokens // CLASSES)
    for sample in sorted(members, key=lambda sample: -(lengths[sample] // step)):  # stable: shuffled inside a class
        length = lengths[sample]
        fitting = free_values >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[free].pop()
            if not rows_with[free]:
                free_values ^= 1 << free
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(sample)
        rows_with.setdefault(free - length, []).append(row)
        free_values |= 1 << (free - length)
    # within a row, back to the shuffled order: a place in the row says nothing about length
    return [sorted(row, key=place.__getitem__) for row in rows]


def loads(
    rows: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, tiles: Sequence[int] | np.ndarray
) -> np.ndarray:
    """What rows make to do: float64 [rows, 3], tokens, tiles and attention pairs, each with a mean of 1 (or 0)."""
    samples = np.fromiter((index for row in rows for index in row), np.int64)
    tokens = np.asarray(lengths, np.int64)[samples]
    each = np.stack([tokens, np.asarray(tiles, np.int64)[samples], tokens * (tokens + 1) // 2], axis=1)
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    sums = np.add.reduceat(each, starts, axis=0) if rows else np.zeros((0, 3))
    return sums / np.maximum(sums.mean(axis=0), 1e-9) if rows else sums


def even_out(load: np.ndarray) -> list[int]:
    """An order of rows in which the load of any stretch is near the mean: error diffusion.

    Next comes, out of the CANDIDATES rows that are first in line, the one that keeps the sum so far nearest to what it
    should be. So a row moves by some dozens of places, and a shuffled order stays shuffled beyond that.
    """
    if not len(load):
        return []
    deviations = load - load.mean(axis=0)
    line = list(range(min(CANDIDATES, len(load))))
    order, error = [], np.zeros(load.shape[1])
    for position in range(len(load)):
        errors = error + deviations[line]
        chosen = int((errors * errors).sum(axis=1).argmin())
        error = errors[chosen]
        order.append(line.pop(chosen))
        if position + CANDIDATES < len(load):
            line.append(position + CANDIDATES)
    return order


def deal(load: Sequence[float], sizes: Sequence[int]) -> list[list[int]]:
    """Share rows out among parts of the given numbers of rows, with nearly equal load for their size.

    Heaviest first, each to the part that has least so far for its size and still has room (after Graham 1969). Within a
    part, rows keep their order.
    """
    sums = [0.0] * len(sizes)
    shares: list[list[int]] = [[] for _ in sizes]
    for row in sorted(range(len(load)), key=lambda row: -load[row]):
        part = min(
            (part for part, size in enumerate(sizes) if len(shares[part]) < size),
            key=lambda part: sums[part] / sizes[part],
        )
        sums[part] += load[row]
        shares[part].append(row)
    return [sorted(share) for share in shares]


def arrange(load: Sequence[float], rows_per_pass: int, ranks: int = 1) -> list[int]:
    """An order of a step's rows in which no pass of any rank is far heavier than another.

    It is for ranks that take every `ranks`-th row, in passes of `rows_per_pass` of these, one after another.
    """
    of_rank = len(load) // ranks
    sizes = [min(rows_per_pass, of_rank - first) for first in range(0, of_rank, rows_per_pass)]
    shares = deal(load, [size for size in sizes for _ in range(ranks)])
    return [
        share[place]
        for number, size in enumerate(sizes)
        for place in range(size)
        for share in shares[number * ranks : (number + 1) * ranks]
    ]


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> float:
    """The share of the rows' tokens that is not padding."""
    return sum(lengths[index] for row in rows for index in row) / max(1, len(rows) * row_tokens)
