"""When to write a checkpoint: every so many steps, or as often as the machine's preemptions make it worth while."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


def young_interval(save_seconds: float, preemption_hours: float) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 x seconds of a save x mean seconds between failures).

    Rarer ones lose more work to a preemption, more frequent ones more time to saving (Young 1974, "A first order
    approximation to the optimum checkpoint interval", eq. 9).
    """
    return math.sqrt(2 * save_seconds * preemption_hours * 3600)


@dataclass
class Pace:
    """Says after which steps a checkpoint is due.

    Without `preemption_hours`, after every `every` steps. With it, after the first step, to measure what a save takes
    (and to learn at once whether the disk has the room), and from then on at Young's interval.

    Attributes:
        agreed: where several processes train, makes a number that each measured one that all have. A save is joint work:
            all must want it after the same step.
    """

    every: int
    preemption_hours: float | None = None
    agreed: Callable[[float], float] = lambda number: number
    save_seconds: float = field(default=0.0, init=False)
    """What the last save took; 0 before the first."""
    _next: int | None = field(default=None, init=False)

    def due(self, step: int) -> bool:
        """Whether to save when so many steps are finished."""
        if self.preemption_hours is None:
            return step % self.every == 0
        return self._next is None or step >= self._next

    def saved(self, step: int, seconds: float, step_seconds: float) -> None:
        """A save after so many steps took `seconds`, where a step takes `step_seconds`."""
        self.save_seconds = seconds
        if self.preemption_hours is not None:
            interval = young_interval(max(seconds, 1e-3), self.preemption_hours)
            self._next = step + max(1, round(self.agreed(interval / max(step_seconds, 1e-6))))
