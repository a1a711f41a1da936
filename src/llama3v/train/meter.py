"""One clock for a run: throughput, waiting, time and dollars so far and to come. It survives resume.

Every step is one line of metrics.jsonl; on a terminal a live line shows the same.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

COUNTED = ("visual_tokens", "text_tokens", "supervised_tokens", "tiles")
WINDOW = 20  # steps over which rates are averaged


class Meter:
    """Counts what was processed and what it took.

    Args:
        steps: of the whole run.
        dollars_per_hour: price of the machine; 0 where it is not to be stated.
        seconds: what earlier parts of the run took, time lost to interruptions after the last checkpoint included.
        counts: what earlier parts of the run have processed.
    """

    def __init__(
        self, steps: int, dollars_per_hour: float = 0.0, seconds: float = 0.0, counts: dict[str, int] | None = None
    ) -> None:
        self.steps, self.dollars_per_hour = steps, dollars_per_hour
        self.counts = {name: (counts or {}).get(name, 0) for name in COUNTED}
        self._before, self._started = seconds, perf_counter()
        self._recent: deque[tuple[float, float, dict[str, int]]] = deque(maxlen=WINDOW)  # seconds, waited, counts

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, earlier parts included."""
        return self._before + perf_counter() - self._started

    @property
    def dollars(self) -> float:
        return self.seconds / 3600 * self.dollars_per_hour

    def step(self, step: int, counts: dict[str, int], seconds: float, waited: float) -> dict[str, Any]:
        """Count one finished step; returns its part of the metrics line.

        Args:
            step: number of steps finished, this one included.
            seconds: what the step took, of which `waited` were spent waiting for data.
        """
        for name in COUNTED:
            self.counts[name] += counts[name]
        self._recent.append((seconds, waited, counts))
        total = sum(seconds for seconds, _, _ in self._recent) or 1e-9
        rates = {f"{name}_per_second": sum(c[name] for _, _, c in self._recent) / total for name in COUNTED}
        return {
            **counts,
            **{name: round(rate, 1) for name, rate in rates.items()},
            "wait_share": round(sum(waited for _, waited, _ in self._recent) / total, 4),
            "step_seconds": round(seconds, 4),
            "seconds": round(self.seconds, 2),
            "seconds_left": round(total / len(self._recent) * (self.steps - step), 1),
            "dollars": round(self.dollars, 6),
        }


class MetricsLog:
    """metrics.jsonl: one line per step, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Onto the disk; before a checkpoint is committed that will not write these lines again."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut short is left out."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                yield record


def trim_metrics(path: Path, step: int) -> float:
    """Forget the lines after a step, which the resumed run writes again.

    Returns the seconds of the last line there was: time that was spent, even if its steps were lost.
    """
    seconds = 0.0
    temporary = path.with_name(f".{path.name}.trimmed")
    with temporary.open("w") as file:
        for record in read_metrics(path):
            seconds = max(seconds, record.get("seconds", 0.0))
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return seconds


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line now and then."""

    PLAIN_LINES = 20  # over the whole run, where the output is not a terminal
    SECONDS_BETWEEN_NOTES = 60.0

    def __init__(self, console: "Console", title: str, steps: int, done: int, priced: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._console, self._title, self._steps, self._priced = console, title, steps, priced
        self._every = max(1, steps // self.PLAIN_LINES)
        self._noted = -inf  # when the last note was printed
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, text="")

    def __enter__(self) -> "ProgressLine":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Show one step's metrics."""
        step = record["step"]
        text = describe(record, priced=self._priced)
        self._progress.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and (step % self._every == 0 or step in (1, self._steps)):
            self._console.print(f"{self._title} {step}/{self._steps}  {text}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """What the run does at the moment instead of a step; empty where that is over. May be called in a thread."""
        if not text:
            return
        self._progress.update(self._task, text=text)
        if not self._console.is_terminal and perf_counter() - self._noted > self.SECONDS_BETWEEN_NOTES:
            self._console.print(f"{self._title}: {text}", highlight=False, soft_wrap=True, markup=False)
            self._noted = perf_counter()

    def say(self, text: str) -> None:
        """A lasting line above the live one."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def describe(record: dict[str, Any], *, priced: bool) -> str:
    """One step in one line, for people."""
    tokens = record["visual_tokens_per_second"] + record["text_tokens_per_second"]
    parts = [
        f"loss {record['loss']:.3f}" if record["loss"] is not None else "loss not finite",
        f"{tokens:,.0f} tokens/s",
        f"{record['tiles_per_second']:,.1f} tiles/s",
        f"waiting {record['wait_share']:.0%}",
        f"{_clock(record['seconds_left'])} left",
    ]
    if priced:
        parts.append(f"${record['dollars']:.2f}" if record["dollars"] >= 0.1 else f"${record['dollars']:.4f}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
