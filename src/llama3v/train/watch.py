"""What looks on while a model trains, after every step: whether the money is spent."""

from dataclasses import dataclass

from llama3v.train.display import dollars
from llama3v.train.meter import Meter, Record
from llama3v.train.pace import Pace
from llama3v.train.signals import StopRequest


@dataclass
class Budget:
    """Asks for a stop before the run would cost more than `limit` dollars, its last checkpoint included."""

    limit: float
    meter: Meter
    pace: Pace
    stop: StopRequest

    def after_step(self, record: Record | None = None) -> None:
        """To be called before the first step, too: a resumed run may have spent all."""
        next_step = self.meter.price(self.meter.step_seconds + self.pace.save_seconds)
        if self.meter.dollars + next_step < self.limit:
            return
        spent = self.meter.dollars
        left = f", about {dollars(record['dollars_left'])} more to the end" if record else ""
        self.stop.ask(
            f"the budget of {dollars(self.limit)} ({dollars(spent)} spent{left})",
            "run the same command with a higher --budget to go on",
        )
