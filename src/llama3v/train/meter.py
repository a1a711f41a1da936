"""One clock for a run: throughput, use of the device, waiting, memory, time and dollars so far and to come.

It survives resume. Every step is one line of metrics.jsonl; trackers and the display are told the same line.
"""

import json
import os
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

COUNTED = ("visual_tokens", "text_tokens", "supervised_tokens", "tiles", "attention_pairs")
RATED = COUNTED[:4]  # of these, rates are worth showing
WINDOW = 20  # steps over which rates are averaged

Record = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Device:
    """What the work runs on, for the meter.

    Attributes:
        flops: counts of a step -> its floating-point operations (plan/flops.py).
        gemm_rate: matrix products of one device at the run's precision, measured at start, in operations per second.
        memory: bytes that this process has needed at most, on the device.
        processes: that train together, one device each.
        summed: adds numbers up over these processes.
    """

    flops: Callable[[Mapping[str, int]], float]
    gemm_rate: float
    memory: Callable[[], int]
    processes: int = 1
    summed: Callable[[dict[str, float]], dict[str, float]] = lambda numbers: numbers


class Meter:
    """Counts what was processed and what it took.

    Args:
        steps: of the whole run.
        dollars_per_hour: price of the machine (of all that train together); 0 where it is not to be stated.
        seconds: what earlier parts of the run took, time lost to interruptions after the last checkpoint included.
        counts: what earlier parts of the run have processed.
        device: without it, use of the device and memory are not told.
    """

    def __init__(
        self,
        steps: int,
        dollars_per_hour: float = 0.0,
        seconds: float = 0.0,
        counts: Mapping[str, int] | None = None,
        device: Device | None = None,
    ) -> None:
        self.steps, self.dollars_per_hour, self.device = steps, dollars_per_hour, device
        self.counts = {name: (counts or {}).get(name, 0) for name in COUNTED}
        self._before, self._started = seconds, perf_counter()
        self._recent: deque[tuple[float, float, dict[str, int]]] = deque(maxlen=WINDOW)  # seconds, waited, counts
        self._ended = self._started  # of the last step
        self._between, self._steps_here = 0.0, 0  # seconds between steps, and steps, in this part of the run

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, earlier parts included."""
        return self._before + perf_counter() - self._started

    @property
    def dollars(self) -> float:
        return self.price(self.seconds)

    @property
    def step_seconds(self) -> float:
        """What a step takes, on average over the last ones; 0 before the first."""
        return sum(seconds for seconds, _, _ in self._recent) / max(1, len(self._recent))

    def price(self, seconds: float) -> float:
        """Dollars for so long."""
        return seconds / 3600 * self.dollars_per_hour

    def step(self, step: int, counts: Mapping[str, int], seconds: float, waited: float) -> Record:
        """Count one finished step; returns its part of the metrics line.

        Args:
            step: number of steps finished, this one included.
            counts: what this process processed, by the names in COUNTED.
            seconds: what the step took, of which `waited` were spent waiting for data.
        """
        counts, waited = self._of_all_processes(counts, waited)
        for name in COUNTED:
            self.counts[name] += counts[name]
        self._recent.append((seconds, waited, counts))
        now = perf_counter()
        if self._steps_here:  # before the first there is only loading, which does not come again
            self._between += max(0.0, now - self._ended - seconds)
        self._ended, self._steps_here = now, self._steps_here + 1
        total = sum(seconds for seconds, _, _ in self._recent) or 1e-9
        left = (self.steps - step) * (self.step_seconds + self._between / self._steps_here)
        return {
            **counts,
            **{f"{name}_per_second": round(sum(c[name] for _, _, c in self._recent) / total, 1) for name in RATED},
            "wait_share": round(sum(waited for _, waited, _ in self._recent) / total, 4),
            **self._use_of_device(total),
            "step_seconds": round(seconds, 4),
            "seconds": round(self.seconds, 2),
            "seconds_left": round(left, 1),
            "dollars": round(self.dollars, 6),
            "dollars_left": round(self.price(left), 6),
        }

    def _of_all_processes(self, counts: Mapping[str, int], waited: float) -> tuple[dict[str, int], float]:
        if self.device is None or self.device.processes == 1:
            return dict(counts), waited
        sums = self.device.summed({**counts, "waited": waited})
        return {name: round(sums[name]) for name in COUNTED}, sums["waited"] / self.device.processes

    def _use_of_device(self, seconds: float) -> Record:
        """Model FLOPs utilisation, against what the devices' matrix products reach; and memory."""
        if self.device is None:
            return {"mfu": None, "memory_gb": None}
        done = sum(self.device.flops(counts) for _, _, counts in self._recent)
        mfu = done / seconds / (self.device.gemm_rate * self.device.processes)
        return {"mfu": round(mfu, 4), "memory_gb": round(self.device.memory() / 1e9, 3)}


def peak_memory() -> int:
    """Bytes of main memory that this process has needed at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class MetricsLog:
    """metrics.jsonl: one line per step, flushed at once; whoever listens is told each line, too.

    Args:
        writes: False on ranks other than 0, which have nothing to add.
    """

    def __init__(self, path: Path, listeners: Sequence[Callable[[Record], None]] = (), *, writes: bool = True) -> None:
        self.path = path
        self.listeners = list(listeners)
        self._file = path.open("a") if writes else None

    def append(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for listener in self.listeners:
            listener(record)

    def sync(self) -> None:
        """Onto the disk; before a checkpoint is committed that will not write these lines again."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> Iterator[Record]:
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
    if not path.exists():
        return seconds
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
