"""The encode pass on the terminal: one line that says how fast it is and whether the tower waits."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from llama3v.feature_cache.encode import Counts


class EncodeProgress:
    """Shows a pass's counts while they grow. As a context manager, it owns the line on the terminal.

    Args:
        counts: read at every `update`.
        title: name of the data set.
        samples: how many there are; None where only reading to the end would tell: then they are counted up.
        hidden: shows nothing, where another process shows the whole.

    Attributes:
        note: shown while it is not empty: what the pass does instead of encoding.
    """

    note = ""

    def __init__(self, counts: "Counts", title: str, samples: int | None, hidden: bool = False) -> None:
        self._counts = counts
        self._started = time.perf_counter()
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), TextColumn("{task.fields[words]}")]
        if samples is None:
            columns.append(TimeElapsedColumn())
        else:
            columns[1:1] = [BarColumn(bar_width=20)]
            columns.append(TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True, highlight=False, quiet=hidden))
        self._task = self._progress.add_task(title, total=samples, words="")

    def __enter__(self) -> "EncodeProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Show the counts as they are now."""
        counts, seconds = self._counts, time.perf_counter() - self._started
        words = [
            f"{counts.images:,} images",
            f"{counts.images / seconds:,.1f} images/s",
            f"{counts.tiles_per_second(seconds):,.1f} tiles/s",
        ]
        if counts.tiles:
            words.append(f"{counts.wait_share(seconds):.0%} waiting")
        if counts.left_out:
            words.append(f"{counts.left_out:,} left out")
        if self.note:
            words.append(self.note)
        self._progress.update(self._task, completed=counts.samples, words=" · ".join(words))


def scrub_progress(total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar over bytes, for reading a whole cache; gives the function that advances it."""
    return _bytes_progress("verifying", total_bytes)


def prune_progress(total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar over the bytes of records that are moved to new shards."""
    return _bytes_progress("moving what stays", total_bytes)


@contextmanager
def _bytes_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(title), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda count: progress.advance(task, count)
