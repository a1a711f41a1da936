"""Packing: samples of different length into rows of one length, nearly without padding.

Best fit decreasing (Johnson 1974) fills rows well, but it would pair the same lengths, and so the same samples, in
every epoch. Two things keep who meets whom random at a cost of 1% of a row: the epoch's order is cut into windows
that are packed one by one, and "decreasing" goes by coarse classes of length, shuffled inside. The rows are then
shuffled over the whole epoch.

Where a row holds only a few samples of nearly one length, no packing is tight (7-tile images of 600 tokens in rows
of 1,024: one each): choose `row_tokens` as a multiple of what is common in the data.
"""

from collections.abc import Sequence

from llama3v.data.order import epoch_order
from llama3v.errors import DataError

WINDOW = 2048  # samples packed together; twice as many gain less than half a percent of a row (measured)
CLASSES = 16  # classes of length; twice as many gain 0.2% of a row and double the neighbours that meet again


def pack(lengths: Sequence[int], row_tokens: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Distribute samples over rows.

    Args:
        lengths: tokens of each sample, visual tokens included.
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
    return [rows[index] for index in epoch_order(seed ^ 2**63, epoch, len(rows))]


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


def fill(rows: Sequence[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> float:
    """The share of the rows' tokens that is not padding."""
    return sum(lengths[index] for row in rows for index in row) / max(1, len(rows) * row_tokens)
