"""Trackers get every figure of every line, and none is imported unless it is asked for."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama3v.errors import ConfigError
from llama3v.train.trackers import tracked

LINES = [
    {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "mfu": None, "loss_alarm": {"usual": 1.0}},
    {"step": 2, "loss": None, "learning_rate": 5e-4, "mfu": 0.4, "tiles": 3},
    {"step": 2, "validation_loss": 1.5, "validation_gap": 0.5},
]
FIGURES = [
    (1, {"loss": 2.5, "learning_rate": 1e-3}),
    (2, {"learning_rate": 5e-4, "mfu": 0.4, "tiles": 3}),
    (2, {"validation_loss": 1.5, "validation_gap": 0.5}),
]


class Service:
    """Stands for the package of a service; remembers what it was told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> "Service":
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_figure_and_the_parts_of_a_run_are_one_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)  # type: ignore[arg-type]
    for step in (0, 1, 0):
        with tracked([name], tmp_path, "pretrain", {"seed": 0}, step) as tell:
            for line in LINES:
                tell(line)
    assert service.told == FIGURES * 3
    assert service.finished == 3
    first, resumed, anew = [str(options.get("id", options["name"])) for options in service.begun]
    assert first == resumed != anew
    assert all(options["resume"] == "allow" for options in service.begun)
    assert service.begun[0]["config"] == {"seed": 0}


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, loss in ((0, 2.0), (3, 1.0)):  # the second part goes on after step 3
        with tracked(["tensorboard"], tmp_path, "pretrain", {}, step) as tell:
            for number in range(step + 1, 6):
                tell({"step": number, "loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_names_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with (
        pytest.raises(ConfigError, match=rf"pip install 'llama3v\[{name}\]'"),
        tracked([name], tmp_path, "pretrain", {}, 0),
    ):
        pass


def test_trackers_that_are_open_are_closed_where_another_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "trackio", None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError), tracked(["wandb", "trackio"], tmp_path, "pretrain", {}, 0):
        pass
    assert service.finished == 1


def test_without_trackers_none_is_imported() -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from llama3v.train.trackers import tracked\n"
        "with tracked((), Path('.'), 'pretrain', {}, 0) as tell: tell({'step': 1, 'loss': 1.0})\n"
        "sys.exit(' '.join({'tensorboard', 'wandb', 'trackio'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
