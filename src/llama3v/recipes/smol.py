"""SmolLM2-135M-Instruct learns to caption real photographs, on two CPU cores.

`python examples/smol.py` is the whole recipe: encode, both stages, captions of held-out photographs, a report. Its
docstring has the exact command. Or stage by stage, on data of your own:

    llama3v encode --data captions.json --vision efficientnet_lite2 --max-tiles 0 --cache cache
    llama3v pretrain --recipe smol --data captions.json --cache cache --out runs/stage1
    llama3v sft --recipe smol --data captions.json --model runs/stage1 --cache cache --out runs/smol

Time, losses and captions, as measured: benchmarks/results/smol/.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig

_BOTH: dict[str, Any] = {"row_tokens": 256, "rows_per_step": 4, "rows_per_pass": 4, "checkpoint_every": 50}
PRETRAIN: dict[str, Any] = _BOTH | {
    "vision": "efficientnet_lite2",
    "llm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "max_tiles": 0,
    "scale_factor": 3,
    "steps": 60,
    "warmup": 0.1,
    "learning_rate": 2e-4,  # at 1e-3 stage 1 learns nothing of the images (docs/training.md)
}
SFT: dict[str, Any] = _BOTH | {"steps": 380, "warmup": 0.05, "learning_rate": 2e-4, "llm_learning_rate": 3e-4}


@dataclass(frozen=True)
class SmolConfig:
    """Train SmolLM2-135M-Instruct with a pretrained tower on photographs and captions, then caption held-out ones.

    Example:
        python examples/smol.py --data flickr8k/train.json --held-out flickr8k/dev.json --llm SmolLM2-135M-Instruct.Q4_1.gguf
    """

    data: str
    """Photographs with captions to train on (LLaVA JSON, or what else `llama3v encode` reads)."""
    held_out: str
    """Photographs with captions that are never trained on; several captions a photograph are used as references."""
    llm: str = PRETRAIN["llm"]
    """Hub name, directory or GGUF file of the language model."""
    vision: str = PRETRAIN["vision"]
    """The vision tower; a SigLIP directory or hub name works the same way."""
    out: Path = Path("runs/smol")
    """Directory for the cache, both stages, the report and the trained model."""
    rows: int = 30_000
    """Rows of `data` that are used."""
    held_out_rows: int = 500
    """Rows of `held_out` whose loss is measured."""
    pretrain_steps: int = PRETRAIN["steps"]
    """Steps of stage 1."""
    sft_steps: int = SFT["steps"]
    """Steps of stage 2."""
    captions: int = 20
    """Held-out photographs in the report."""
    dollars_per_hour: float = 0.10
    """Price of this machine."""


@dataclass(frozen=True)
class Captioned:
    """One held-out photograph: what the model says and what people said."""

    image: str
    picture: bytes
    ours: str
    human: tuple[str, ...]


def smol(config: SmolConfig) -> dict[str, Any]:
    """Both stages over one cache, on real photographs; then captions of photographs it never saw.

    Command: examples/smol.py (its docstring has the exact line). Hardware: 2 CPU cores. Measured times, losses
    and captions: benchmarks/results/smol/.

    Returns the summary, with `validation_loss` (right image) and `validation_loss_shuffled` of both stages. Writes
    report.html with the photographs and report-without-pictures.html for where they may not be published.
    """
    import llama3v

    out, cache = config.out, config.out / "cache"
    for name, data, rows in (("train", config.data, config.rows), ("held-out", config.held_out, config.held_out_rows)):
        llama3v.encode(
            EncodeConfig(
                data=data, vision=config.vision, cache=cache, out=out / "encode" / name, max_tiles=0, limit=rows
            )
        )
    shared: dict[str, Any] = {
        "data": (config.data,),
        "cache": cache,
        "limit": config.rows,
        "validation": config.held_out,
        "validation_samples": 150,
        "dollars_per_hour": config.dollars_per_hour,
    }
    models = {"vision": config.vision, "llm": config.llm}
    one = {**PRETRAIN, **shared, **models, "steps": config.pretrain_steps}
    two = {**SFT, **shared, "steps": config.sft_steps}
    stage_1 = llama3v.pretrain(PretrainConfig(out=out / "stage1", **one))
    stage_2 = llama3v.sft(SftConfig(out=out, model=str(out / "stage1"), **two))
    captioned = caption_held_out(out, config.held_out, config.captions)
    summary = {
        "recipe": "smol",
        "pretrain": stage_1,
        "sft": stage_2,
        "captions": [{"image": item.image, "model": item.ours, "human": item.human} for item in captioned],
    }
    write_report(out / "report.html", config, summary, captioned, pictures=True)
    write_report(out / "report-without-pictures.html", config, summary, captioned, pictures=False)
    (out / "recipe.json").write_text(json.dumps(summary, indent=1))
    return summary


def caption_held_out(model: Path, held_out: str, count: int) -> list[Captioned]:
    """Caption photographs spread evenly over the held-out set, greedily, with the prompt of its own rows."""
    from llama3v.data.sources.base import Sample, open_source
    from llama3v.engines.torch import TorchEngine

    photographs: dict[str, list[Sample]] = {}
    for row in open_source(held_out):
        if isinstance(row, Sample) and row.images:
            photographs.setdefault(row.images[0].name, []).append(row)
    names = list(photographs)
    chosen = [names[i * len(names) // count] for i in range(min(count, len(names)))]
    engine = TorchEngine(model)
    captioned = []
    for name in chosen:
        rows = photographs[name]
        picture = rows[0].images[0].read()
        ours = engine.answer(rows[0].turns[:1], [picture], max_new_tokens=48)
        captioned.append(Captioned(name, picture, ours.strip(), tuple(row.turns[1].text for row in rows)))
    return captioned


def write_report(
    path: Path, config: SmolConfig, summary: dict[str, Any], captioned: Sequence[Captioned], *, pictures: bool
) -> Path:
    from llama3v.report import GalleryItem, Report
    from llama3v.train.meter import read_metrics

    stages = (("pretrain", config.out / "stage1"), ("sft", config.out))
    report = Report("Llama 3-V smol", f"{Path(config.llm).name} with {config.vision}, on real photographs")
    final = summary["sft"]
    report.add_figures(
        [
            ("loss, right image", round(final["validation_loss"], 3), "per caption token, held-out photographs"),
            (
                "loss, shuffled images",
                round(final["validation_loss_shuffled"], 3),
                "the same captions, other photographs",
            ),
            ("steps", f"{config.pretrain_steps} + {config.sft_steps}", "stage 1 + stage 2"),
        ]
    )
    report.add_table(
        "Does the loss see the image?",
        ["stage", "right image", "shuffled images", "seconds"],
        [
            [
                name,
                round(summary[name]["validation_loss"], 3),
                round(summary[name]["validation_loss_shuffled"], 3),
                round(summary[name]["seconds"]),
            ]
            for name, _ in stages
        ],
    )
    for name, directory in stages:
        losses = [(row["step"], row["loss"]) for row in read_metrics(directory / "metrics.jsonl") if row.get("loss")]
        report.add_plot(f"{name}, loss", {"training loss": losses}, "step", "loss per supervised token")
    title = "Captions of photographs it never saw"
    if pictures:
        items = [
            GalleryItem(item.picture, [("model", item.ours, None), *(("human", text, None) for text in item.human[:3])])
            for item in captioned
        ]
        report.add_gallery(title, items, "Greedy decoding; people's captions below.")
    else:
        rows = [[item.image, item.ours, " / ".join(item.human[:3])] for item in captioned]
        report.add_table(title, ["photograph", "model", "people"], rows, "Greedy decoding.")
    return report.write(path)
