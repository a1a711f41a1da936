"""The loss-spike alarm: a loss far above those of the last steps is told, with the samples that were in its step.

What is usual is the median of the last losses, and how much they vary is their median distance from it. Both hardly
move for a few wild values, so one spike does not hide the next (Hampel 1974; a normal distribution's standard deviation
is 1.4826 such distances).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llama3v.train.meter import MetricsLog, Record, trim_metrics
from llama3v.train.signals import StopRequest

WINDOW = 64  # steps that say what is usual
LEAST = 16  # of them, before there is an alarm at all: the first steps of a run fall fast
LIMIT = 8.0  # standard deviations; at 6, the noise of steps with few supervised tokens gave alarms
SMALLEST_DEVIATION = 0.02  # of the median: a loss that hardly moves must not give an alarm for a hair
NAMED = 5  # samples in the warning line; alarms.jsonl has all

ALARMS = "alarms.jsonl"


class Usual:
    """The last losses, and what they say of the next."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def deviations(self, loss: float) -> tuple[float, float] | None:
        """(the usual loss, by how many standard deviations this one is above it); None where too little is known."""
        if len(self._losses) < LEAST:
            return None
        usual = median(self._losses)
        spread = 1.4826 * median(abs(other - usual) for other in self._losses)
        return usual, (loss - usual) / max(spread, SMALLEST_DEVIATION * abs(usual), 1e-12)

    def add(self, loss: float) -> None:
        self._losses.append(loss)


@dataclass
class Alarm:
    """Looks at every step's loss; a spike is said, counted in the step's metrics line and kept in alarms.jsonl.

    Attributes:
        names: step -> the ids of its samples.
        say: prints a lasting line.
        stop: asked where a spike shall stop the run; otherwise it never does.
    """

    out: Path
    names: Callable[[int], list[str]]
    say: Callable[[str], None]
    stop: StopRequest | None = None

    def __post_init__(self) -> None:
        self._usual = Usual()

    def resume(self, step: int, records: Iterable[Record]) -> None:
        """Know the steps before, as if the run had never stopped. `records`: their metrics, in order."""
        trim_metrics(self.out / ALARMS, step)
        for record in records:
            if record.get("loss") is not None:
                self._usual.add(record["loss"])

    def after_step(self, record: Record) -> None:
        """Look at one step. A loss that is not finite is no spike: it changes no weight, and is counted on its own."""
        loss, step = record["loss"], record["step"]
        if loss is None:
            return
        found = self._usual.deviations(loss)
        self._usual.add(loss)
        if found is None or found[1] < LIMIT:
            return
        usual, deviations = found
        record["loss_alarm"] = {"usual": usual, "deviations": round(deviations, 1)}
        names = self.names(step)
        log = MetricsLog(self.out / ALARMS)
        log.append({"step": step, "loss": loss, **record["loss_alarm"], "samples": names})
        log.close()
        self.say(
            f"step {step}: loss {loss:.3f}, {deviations:.0f} deviations above the usual {usual:.3f}; {listed(names)}"
        )
        if self.stop is not None:
            self.stop.ask(
                "--stop-on-alarm (a loss spike)",
                f"look at the samples of step {step} in {self.out / ALARMS}; "
                "to go on, run the same command without --stop-on-alarm",
            )


def listed(names: list[str]) -> str:
    """The samples of a step, in a line."""
    more = len(names) - NAMED
    rest = f" and {more:,} more, all in {ALARMS}" if more > 0 else ""
    return f"samples {', '.join(names[:NAMED])}{rest}"
