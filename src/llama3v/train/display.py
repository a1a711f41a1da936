"""A training run for people to watch: a live panel on a terminal, plain lines now and then elsewhere."""

from collections import deque
from itertools import pairwise
from math import inf
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llama3v.train.meter import Record

BLOCKS = "▁▂▃▄▅▆▇█"
LOSSES_SHOWN = 30  # columns of the loss curve; each is the mean of as many steps as that takes


class Display:
    """Shows what it is told: lines of metrics (`show`), what the run waits for (`note`), and lasting lines (`say`).

    Args:
        title: of the run. steps: of the whole run; done: those before this part of it.
        priced: whether to speak of dollars. budget: dollars at which the run stops, if any.
    """

    PLAIN_LINES = 20  # over the whole run, where the output is not a terminal
    SECONDS_BETWEEN_NOTES = 60.0

    def __init__(
        self, console: Console, title: str, steps: int, done: int, *, priced: bool, budget: float | None = None
    ) -> None:
        self._console, self._title, self._steps, self._done = console, title, steps, done
        self._priced, self._budget = priced, budget
        self._every = max(1, steps // self.PLAIN_LINES)
        self._noted = -inf  # when the last note was printed
        self._note, self._alarms = "", 0
        self._last: Record | None = None
        self._validated: Record | None = None
        self._losses: deque[float] = deque(maxlen=max(LOSSES_SHOWN, steps))
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._panel)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._note = ""
            self._live.stop()

    def show(self, record: Record) -> None:
        """Show one line of metrics, of a step or of a validation."""
        if "validation_loss" in record:
            self._validated = record
            self._plain(f"step {record['step']}: {describe_validation(record)}")
        if "loss" not in record:
            return
        step, self._done, self._last = record["step"], record["step"], record
        if record["loss"] is not None:
            self._losses.append(record["loss"])
        self._alarms += "loss_alarm" in record
        if step % self._every == 0 or step in (1, self._steps):
            text = describe(record, priced=self._priced, budget=self._budget)
            self._plain(f"{self._title} {step:,}/{self._steps:,}  {text}")

    def note(self, text: str) -> None:
        """What the run does at the moment instead of a step; empty where that is over. May be called in a thread."""
        self._note = text
        if text and not self._console.is_terminal and perf_counter() - self._noted > self.SECONDS_BETWEEN_NOTES:
            self._plain(f"{self._title}: {text}")
            self._noted = perf_counter()

    def say(self, text: str) -> None:
        """A lasting line, above the panel."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _plain(self, text: str) -> None:
        if not self._console.is_terminal:
            self.say(text)

    def _panel(self) -> RenderableType:
        bar = ProgressBar(total=self._steps, completed=self._done)  # alone, it ends without a line break
        parts: list[RenderableType] = [Padding(bar, 0), self._table()]
        if self._note:
            parts.append(Text(self._note, style="yellow"))
        share = f"{self._done / self._steps:.0%}"
        return Panel(
            Group(*parts),
            title=f"[bold]{self._title}[/]  step {self._done:,} of {self._steps:,}  {share}",
            title_align="left",
            subtitle=self._time_left(),
            subtitle_align="right",
            border_style="dim",
            width=min(self._console.width, 100),
        )

    def _time_left(self) -> str:
        if self._last is None:
            return "starting"
        return f"{clock(self._last['seconds'])} so far, {clock(self._last['seconds_left'])} left"

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        if self._last is not None:
            for name, text in panel_rows(self._last, priced=self._priced, budget=self._budget):
                if name == "loss":
                    curve = sparkline(list(self._losses), LOSSES_SHOWN)
                    table.add_row(name, Text.assemble((f"{text}  ", "bold"), (curve, "cyan")))
                else:
                    table.add_row(name, text)
        if self._validated is not None:
            table.add_row("does it see?", f"{describe_validation(self._validated)} (step {self._validated['step']:,})")
        if self._alarms:
            steps = "1 step" if self._alarms == 1 else f"{self._alarms} steps"
            table.add_row("alarms", Text(f"{steps} with a loss far above the steps before", style="bold red"))
        return table


def panel_rows(record: Record, *, priced: bool, budget: float | None) -> list[tuple[str, str]]:
    """What the panel says about a step: (name, text), line by line."""
    rows = [
        ("loss", _loss(record)),
        ("tokens/s", f"{_tokens(record)}: {_kinds(record)}"),
        ("tiles/s", f"{record['tiles_per_second']:,.1f}"),
        ("device", "  ".join(_device(record))),
    ]
    if "learning_rate" in record:
        rows.insert(1, ("rate", f"{record['learning_rate']:.2e}{_gradient(record)}"))
    if priced:
        rows.append(("cost", _cost(record, budget)))
    return rows


def describe(record: Record, *, priced: bool, budget: float | None = None) -> str:
    """One step in one line, for people."""
    parts = [
        f"loss {_loss(record)}",
        f"{_tokens(record)} tokens/s ({_kinds(record)})",
        f"{record['tiles_per_second']:,.1f} tiles/s",
        *_device(record),
        f"{clock(record['seconds_left'])} left",
    ]
    if priced:
        parts.append(_cost(record, budget))
    return "  ".join(parts)


def describe_validation(record: Record) -> str:
    """A validation in one line: the loss with the right and with shuffled images."""
    text = f"validation loss {record['validation_loss']:.3f}"
    if record["validation_gap"] is None:
        return text + ", no images to shuffle"
    return f"{text}, with shuffled images {record['validation_loss_shuffled']:.3f}, gap {record['validation_gap']:.3f}"


def sparkline(values: list[float], width: int) -> str:
    """Values as a line of blocks, at most `width` of them: each the mean of neighbours, the highest block the largest."""
    if not values:
        return ""
    columns = min(width, len(values))
    ends = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def dollars(amount: float) -> str:
    """$12.34; of small amounts, the first digits that are not 0."""
    return f"${amount:,.2f}" if amount >= 0.1 or amount == 0 else f"${amount:.2g}"


def _loss(record: Record) -> str:
    return f"{record['loss']:.3f}" if record["loss"] is not None else "not finite"


def _gradient(record: Record) -> str:
    norm = record.get("gradient_norm")
    return f"  gradient norm {norm:.2f}" if norm is not None else ""


def _tokens(record: Record) -> str:
    return f"{record['visual_tokens_per_second'] + record['text_tokens_per_second']:,.0f}"


def _kinds(record: Record) -> str:
    kinds: list[tuple[str, Any]] = [
        (name, record[f"{name}_tokens_per_second"]) for name in ("visual", "text", "supervised")
    ]
    return ", ".join(f"{name} {rate:,.0f}" for name, rate in kinds)


def _device(record: Record) -> list[str]:
    parts = [f"waiting {record['wait_share']:.0%}"]
    if record.get("mfu") is not None:
        parts.insert(0, f"MFU {record['mfu']:.0%}")
    if record.get("memory_gb") is not None:
        parts.append(f"{record['memory_gb']:.1f} GB")
    return parts


def _cost(record: Record, budget: float | None) -> str:
    text = f"{dollars(record['dollars'])} of {dollars(record['dollars'] + record['dollars_left'])}"
    return text if budget is None else f"{text}, budget {dollars(budget)}"
