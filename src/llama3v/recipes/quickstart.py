"""The embedded default: a small Llama 3-V built for real from scenes that are drawn here, on any machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import EncodeConfig, PretrainConfig, QuickstartConfig, SftConfig

if TYPE_CHECKING:
    from llama3v.data.synthetic.dataset import SceneFiles
    from llama3v.engines.torch import TorchEngine
    from llama3v.evaluate.sight import Probe, Sight

ASSETS = Path(__file__).parents[1] / "assets"
SCENE_TOWER = ASSETS / "siglip-scenes"
SCENE_LLM = ASSETS / "llama-scenes"
HELD_IN, HELD_OUT = 2000, 200  # scenes
STAGE_1_STEPS, STAGE_2_STEPS = 600, 1000
CLOSING_QUESTION = "Describe the image."
EXAMPLE = "scene.png"  # a held-out scene, left in the output for README's first question


def quickstart(config: QuickstartConfig | None = None) -> dict[str, Any]:
    """Build a small Llama 3-V for real: encode, pretrain, sft, evaluate, report, ask.

    Command: `llama3v quickstart`. Hardware: 2 CPU cores.

    Returns the summary: `accuracy_right_image`, `accuracy_wrong_image`, `accuracy_blind` (shares of exact answers on
    held-out scenes), `seconds`, `dollars`, and the same by kind of question and by phase. `config.out` is then a model.
    """
    from rich.console import Console

    import llama3v
    from llama3v.data.synthetic.dataset import write_scenes
    from llama3v.recipes.quickstart_report import write_report

    config = config or QuickstartConfig()
    console, clock = Console(), _Clock()
    out, cache = config.out, config.out / "cache"

    with clock.phase(console, "draw scenes"):
        held_in = write_scenes(out / "data" / "train", f"train-{config.seed}", HELD_IN)
        held_out = write_scenes(out / "data" / "held-out", "held-out", HELD_OUT)
    with clock.phase(console, "encode pass: SigLIP once, features into the cache"):
        encoded = [
            llama3v.encode(
                EncodeConfig(data=str(data), vision=str(SCENE_TOWER), cache=cache, out=out / "encode" / name)
            )
            for name, data in (
                ("captions", held_in.captions),
                ("conversations", held_in.conversations),
                ("held-out", held_out.conversations),
            )
        ]
    shared: dict[str, Any] = {
        "cache": cache,
        "seed": config.seed,
        "checkpoint_every": 300,
        "keep_checkpoints": 1,
        "validation": str(held_out.conversations),
        "validation_samples": 64,
        "dollars_per_hour": config.dollars_per_hour,
    }
    with clock.phase(console, "stage 1, pretrain: the projector learns, the LLM is frozen"):
        stage_1 = llama3v.pretrain(
            PretrainConfig(
                data=(str(held_in.captions),),
                out=out / "stage1",
                vision=str(SCENE_TOWER),
                llm=str(SCENE_LLM),
                scale_factor=2,
                row_tokens=256,
                rows_per_step=2,  # many small steps: at one price they teach a model this small more than few large ones
                steps=STAGE_1_STEPS,
                learning_rate=4e-3,
                **shared,
            )
        )
    with clock.phase(console, "stage 2, sft: projector and LLM learn from conversations"):
        stage_2 = llama3v.sft(
            SftConfig(
                data=(str(held_in.conversations),),
                out=out,
                model=str(out / "stage1"),
                row_tokens=384,
                rows_per_step=3,
                steps=STAGE_2_STEPS,
                learning_rate=2.5e-3,
                llm_learning_rate=7e-4,
                **shared,
            )
        )
    with clock.phase(console, "evaluation on held-out scenes: right image, wrong image, blind"):
        from llama3v.engines.torch import TorchEngine

        engine = TorchEngine(out)
        sight = _evaluate(engine, held_out, cache)
    summary = _summary(config, sight, clock, encoded, stage_1, stage_2)
    write_report(out / "report.html", config, summary, sight, held_out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    _close(console, config, summary, engine, held_out)
    return summary


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @contextmanager
    def phase(self, console: Any, title: str) -> Iterator[None]:
        console.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        yield
        self.phases[title.split(":")[0]] = round(time.monotonic() - start, 1)


def _evaluate(engine: "TorchEngine", held_out: "SceneFiles", cache: Path) -> "Sight":
    from rich.progress import Progress

    from llama3v.evaluate.sight import CONDITIONS, measure_sight

    probes = _probes(held_out, cache, engine)
    with Progress(transient=True) as progress:
        task = progress.add_task("answers", total=len(CONDITIONS) * len(probes))
        return measure_sight(engine, probes, advance=lambda count: progress.advance(task, count))


def _probes(held_out: "SceneFiles", cache: Path, engine: "TorchEngine") -> list["Probe"]:
    """One question of each kind (two of a sheet) about each held-out scene, asked alone."""
    import random

    from llama3v.data.synthetic.language import questions
    from llama3v.engines.base import ImageFeatures
    from llama3v.evaluate.sight import Probe
    from llama3v.feature_cache.layout import manifest_of
    from llama3v.feature_cache.reader import CacheReader
    from llama3v.model.tiles import image_key

    probes = []
    tower = engine.model.vision
    manifest = manifest_of(tower.fingerprint(), tile_size=tower.tile_size, max_tiles=engine.model.config.max_tiles)
    with CacheReader(cache, manifest=manifest) as reader:
        for scene, picture in zip(held_out.scenes, held_out.pictures, strict=True):
            key = image_key(picture.read_bytes())
            image = ImageFeatures(reader.read(key).float(), reader.record(key).grid)
            asked: dict[str, int] = {}
            for question in questions(scene, random.Random(scene.seed + "/probe")):
                asked[question.kind] = asked.get(question.kind, 0) + 1
                if asked[question.kind] <= (2 if scene.is_sheet else 1):
                    probes.append(Probe(question.kind, question.text, question.answer, image, str(picture)))
    return probes


def _summary(
    config: QuickstartConfig,
    sight: "Sight",
    clock: _Clock,
    encoded: list[dict[str, Any]],
    stage_1: dict[str, Any],
    stage_2: dict[str, Any],
) -> dict[str, Any]:
    import platform

    from llama3v.data.synthetic.language import KINDS
    from llama3v.evaluate.sight import CONDITIONS

    right, wrong, blind = (round(sight.accuracy(condition), 4) for condition in CONDITIONS)
    return {
        "accuracy_right_image": right,
        "accuracy_wrong_image": wrong,
        "accuracy_blind": blind,
        "questions": len(sight.probes),
        "by_kind": {
            kind: {condition: round(sight.accuracy(condition, kind), 4) for condition in CONDITIONS}
            for kind in KINDS
            if kind in sight.kinds()
        },
        "seconds": round(clock.seconds, 1),
        "seconds_by_phase": clock.phases,
        "dollars": round(clock.seconds / 3600 * config.dollars_per_hour, 4),
        "dollars_per_hour": config.dollars_per_hour,
        "seed": config.seed,
        "encode": encoded,
        "pretrain": stage_1,
        "sft": stage_2,
        "environment": {
            "machine": platform.machine(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("llama3v", "torch", "transformers")},
        },
    }


def _close(
    console: Any, config: QuickstartConfig, summary: dict[str, Any], engine: "TorchEngine", held_out: "SceneFiles"
) -> None:
    """Headline figures, one question, and what to try next."""
    from rich.table import Table

    from llama3v.model.prompt import Turn

    table = Table("question", "right image", "wrong image", "blind", title="Share of exact answers on held-out scenes")
    for kind, row in summary["by_kind"].items():
        table.add_row(kind, *(f"{value:.2f}" for value in row.values()))
    table.add_section()
    names = ("accuracy_right_image", "accuracy_wrong_image", "accuracy_blind")
    table.add_row("all", *(f"{summary[name]:.2f}" for name in names), style="bold")
    console.print(table)
    picture = config.out / EXAMPLE
    picture.write_bytes(held_out.pictures[1].read_bytes())
    console.rule("[bold]ask", align="left")
    console.print(f'$ llama3v ask {picture} "{CLOSING_QUESTION}" --model {config.out}', highlight=False, soft_wrap=True)
    turns = [Turn("user", CLOSING_QUESTION, images=(0,))]
    console.print(engine.answer(turns, [picture.read_bytes()], max_new_tokens=96), style="green", highlight=False)
    minutes = summary["seconds"] / 60
    console.print(
        f"\n{minutes:.1f} minutes, ${summary['dollars']:.4f} at ${config.dollars_per_hour}/h. "
        f"Open {config.out / 'report.html'}; talk to the model: llama3v chat {picture} --model {config.out}",
        highlight=False,
        soft_wrap=True,
    )
