"""Captions of a folder beside the naive loop of transformers, and the start-up of `ask` in a new process.

    python -m benchmarks.caption --images photos/ --llm SmolLM2-135M-Instruct.gguf --work work --json FILE

The language model is a real one; the vision tower has the shape of SigLIP base (tiles of 224 pixels, 196 patches) and
random weights, which take the same time. Both sides see overviews alone (`--detail low`), since that is what the stock
processor makes; models are loaded before the clock starts, except where start-up is measured. `--prepare` only builds
and exports the model into --work.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import interleaved, row, write_results

TOWER = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
TOWER |= {"num_hidden_layers": 12, "num_attention_heads": 12}
SCALE_FACTOR = 2  # 49 visual tokens a tile
STARTS = 2
MOST_SECONDS_TO_START = 2.5


def prepare(llm: str, work: Path) -> None:
    """model/, and its exports stock/ (float32) and pair/ (GGUF, q8_0, with a vision file), in `work`."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from llama3v.config import ExportConfig
    from llama3v.exporters.verbs import export
    from llama3v.model.llama3v import build_model, save_model

    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).eval().save_pretrained(work / "tower")
    model, tokenizer = build_model(str(work / "tower"), llm, scale_factor=SCALE_FACTOR)
    save_model(model, tokenizer, work / "model")
    del model
    shared: dict[str, Any] = {"model": str(work / "model"), "check": False}
    export(ExportConfig(out=work / "stock", format="hf", **shared))
    export(ExportConfig(out=work / "pair", format="gguf", weights="q8_0", **shared))


Captions = Callable[[list[Path]], list[str]]


def our_captions(model: Path, new_tokens: int) -> Captions:
    """The verb itself on images, its engine loaded beforehand."""
    from llama3v.config import CaptionConfig
    from llama3v.engines.base import Room
    from llama3v.engines.captions import caption
    from llama3v.engines.terminal import open_engine

    room = Room(1, 100, new_tokens, slices=False)
    engine = open_engine(str(model), room=room, quiet=True)

    def run(images: list[Path]) -> list[str]:
        config = CaptionConfig(tuple(map(str, images)), str(model), max_new_tokens=new_tokens, detail="low")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            caption(config, engine)
        return [line.rpartition("\t")[2] for line in out.getvalue().splitlines()]

    return run


def naive_captions(stock: Path, new_tokens: int) -> Captions:
    """Open, resize, normalise, generate: one image after another, as most scripts do."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(stock, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stock)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    size, tokens = TOWER["image_size"], (TOWER["image_size"] // TOWER["patch_size"] // SCALE_FACTOR) ** 2
    inputs = tokenizer(prompt.replace("<image>", "<image>" * tokens), return_tensors="pt")

    @torch.no_grad()
    def one(path: Path) -> str:
        picture = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy((np.asarray(picture, np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)
        out: Any = model.generate(**inputs, pixel_values=pixels[None, None], max_new_tokens=new_tokens)
        return " ".join(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())

    return lambda images: [one(path) for path in images]


def caption_rows(work: Path, photos: list[Path], new_tokens: int) -> list[dict[str, Any]]:
    """Images per second of the naive loop, and of the verb on both engines; first two images of `photos` warm up."""
    from llama3v.engines.captions import TOGETHER

    makers = {
        "transformers": (naive_captions, "stock"),
        "torch": (our_captions, "model"),
        "llama.cpp": (our_captions, "pair"),
    }
    sides = {name: make(work / folder, new_tokens) for name, (make, folder) in makers.items()}
    for run in sides.values():
        run(photos[:2])
    texts: dict[str, list[str]] = {}
    calls = {name: lambda name=name, run=run: texts.update({name: run(photos[2:])}) for name, run in sides.items()}
    seconds = {name: median(values) for name, values in interleaved(calls, 1, warm_up=False).items()}
    count = len(photos) - 2
    same = sum(ours == theirs for ours, theirs in zip(texts["torch"], texts["transformers"], strict=True))
    setting = f"{count} photographs, overviews, up to {new_tokens} new tokens; peer: model.generate, one image at a time, float32"
    notes = {
        "torch": f"{setting}; float32, {TOGETHER['low']} together; {same} of {count} captions are the peer's to the letter",
        "llama.cpp": f"{setting}; ours: LLM in q8_0, tower in OpenVINO in float32",
    }
    return [
        row(
            f"caption a folder, {name}",
            count / seconds[name],
            count / seconds["transformers"],
            unit="images/s",
            note=note,
        )
        for name, note in notes.items()
    ]


def start_rows(work: Path, photo: Path) -> list[dict[str, Any]]:
    """Seconds of a whole `llama3v ask` of one new token, from the start of the process to its end."""
    names = {"pair": "GGUF and OpenVINO", "model": "PyTorch"}
    calls = {name: lambda name=name: _ask(work / name, photo) for name in names}
    seconds = {name: median(values) for name, values in interleaved(calls, STARTS).items()}
    note = (
        "process start to exit: one photograph (overview), one new token; peer: the same model in PyTorch; limit: what "
        f"was asked for; median of {STARTS}"
    )
    return [
        row("ask in a new process", seconds["pair"], seconds["model"], limit=MOST_SECONDS_TO_START, unit="s", note=note)
    ]


def _ask(model: Path, photo: Path) -> None:
    options = ["--model", str(model), "--max-new-tokens", "1", "--detail", "low"]
    subprocess.run(
        [sys.executable, "-m", "llama3v", "ask", str(photo), "What is it?", *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--llm", help="the language model; not needed where --work is prepared")
    parser.add_argument("--work", type=Path, help="directory for the model and its exports (default: a temporary one)")
    parser.add_argument("--count", type=int, default=32, help="photographs")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prepare", action="store_true", help="only build and export the model")
    parser.add_argument("--starts-only", action="store_true", help="measure the start-up alone")
    parser.add_argument("--json", type=Path, help="file of results")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.llm and not (work / "pair").exists():
            prepare(options.llm, work)
        if options.prepare:
            return
        photos = sorted(path for path in options.images.iterdir() if path.suffix in (".jpg", ".webp", ".png"))[
            : options.count + 2
        ]
        started = time.perf_counter()
        rows = start_rows(work, photos[0]) + (
            [] if options.starts_only else caption_rows(work, photos, options.new_tokens)
        )
        packages = ("transformers", "xllamacpp", "openvino")
        write_results(options.json, rows, packages, seconds=round(time.perf_counter() - started))


if __name__ == "__main__":
    main()
