"""The quickstart's report: what was built, how well it sees, what it cost, and pictures with answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama3v.config import QuickstartConfig
from llama3v.evaluate.sight import CONDITIONS, Sight, same_answer
from llama3v.report import GalleryItem, Report
from llama3v.train.meter import read_metrics

if TYPE_CHECKING:
    from llama3v.data.synthetic.dataset import SceneFiles

RIGHT_SHOWN, WRONG_SHOWN = 8, 8


def write_report(
    path: Path, config: QuickstartConfig, summary: dict[str, Any], sight: Sight, held_out: "SceneFiles"
) -> Path:
    report = Report("Llama 3-V quickstart", "A small Llama 3-V built from images and text, and what it sees")
    report.add_figures(
        [
            (
                "with the right image",
                f"{summary['accuracy_right_image']:.1%}",
                f"of {summary['questions']} held-out questions",
            ),
            ("with a wrong image", f"{summary['accuracy_wrong_image']:.1%}", "another scene's picture"),
            ("blind", f"{summary['accuracy_blind']:.1%}", "no picture"),
            ("time", f"{summary['seconds'] / 60:.1f} min", "from start to evaluation"),
            ("cost", f"${summary['dollars']:.4f}", f"at ${config.dollars_per_hour} an hour"),
        ]
    )
    report.add_text(
        "What happened",
        [
            "A frozen, pretrained SigLIP encoded every scene once into a cache. In stage 1 the projector learnt to caption "
            "while the LLM was frozen; in stage 2 projector and LLM learnt from conversations, both from the cache alone. "
            "Encoder and LLM are tiny ones that the package carries; the code is what an 8B model runs.",
            "A model that answers as well with a wrong picture has learnt the questions, not to look. So every held-out "
            "question is asked three times: with its picture, with another scene's, and with none.",
        ],
    )
    report.add_bars(
        "Accuracy by kind of question",
        {kind: {condition: row[condition] for condition in CONDITIONS} for kind, row in summary["by_kind"].items()},
        "Share of exact answers.",
    )
    for stage, directory in (("Stage 1: pretrain", config.out / "stage1"), ("Stage 2: sft", config.out)):
        losses = [(row["step"], row["loss"]) for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]
        report.add_plot(f"{stage}, loss", {"training loss": losses}, "step", "loss per supervised token")
    report.add_table(
        "Does the loss see the image?",
        ["stage", "right image", "shuffled images"],
        [
            [stage, round(summary[name]["validation_loss"], 3), round(summary[name]["validation_loss_shuffled"], 3)]
            for stage, name in (("pretrain", "pretrain"), ("sft", "sft"))
        ],
        "Loss per supervised token on held-out conversations.",
    )
    report.add_gallery("Right answers", _items(sight, True, RIGHT_SHOWN))
    report.add_gallery(
        "Wrong answers", _items(sight, False, WRONG_SHOWN), "Every kind of mistake that was made, first ones first."
    )
    report.add_table(
        "Time and cost",
        ["phase", "seconds", "dollars"],
        [
            [phase, seconds, f"{seconds / 3600 * config.dollars_per_hour:.5f}"]
            for phase, seconds in summary["seconds_by_phase"].items()
        ],
        f"At ${config.dollars_per_hour} an hour, the price stated for this machine.",
    )
    report.add_table("Environment", ["part", "version"], [[k, str(v)] for k, v in summary["environment"].items()])
    return report.write(path)


def _items(sight: Sight, right: bool, most: int) -> Sequence[GalleryItem]:
    """Pictures whose answer was right (or wrong), one of each kind in turn, each picture once."""
    by_kind: dict[str, list[int]] = {kind: [] for kind in sight.kinds()}
    for index, probe in enumerate(sight.probes):
        if same_answer(sight.answers["right image"][index], probe.answer) == right:
            by_kind[probe.kind].append(index)
    chosen: list[int] = []
    while len(chosen) < most and any(by_kind.values()):
        for waiting in by_kind.values():
            if waiting and len(chosen) < most:
                chosen.append(waiting.pop(len(waiting) // 2))
    return [_item(sight, index) for index in chosen]


def _item(sight: Sight, index: int) -> GalleryItem:
    probe = sight.probes[index]
    lines: list[tuple[str, str, bool | None]] = [("question", probe.question, None), ("expected", probe.answer, None)]
    for condition in CONDITIONS:
        answer = sight.answers[condition][index]
        verdict = same_answer(answer, probe.answer) if condition == "right image" else None
        lines.append((condition, answer or "(nothing)", verdict))
    return GalleryItem(Path(probe.picture).read_bytes(), lines)
