"""Decoding, first tokens and start-up, against the same libraries without this package, and against memory's speed.

    python -m benchmarks.decode --llm SmolLM2-135M-Instruct.Q4_1.gguf --work runs/decode --prepare
    python -m benchmarks.decode --llm SmolLM2-135M-Instruct.Q4_1.gguf --work runs/decode --json benchmarks/results/decode.json

The model is the given LLM behind a SigLIP tower of random weights (4 layers of width 384, tiles of 384 pixels, 81 visual
tokens each); decoding depends on the LLM alone. *Bare loop*: llama_decode of one token after another through the C
interface, as llama-bench's text generation does it, without sampling, text or anything else; on the same file, context and
threads. *Roofline*: tokens per second if every weight were read once per token at the speed at which this machine reads
memory, measured in the same run. --prepare writes the models and ends, so that the measurement is short.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from PIL import Image

import llama3v
from benchmarks.common import interleaved, row, write_results
from llama3v.config import ExportConfig, Sampling
from llama3v.engines.generation import CachedGeneration
from llama3v.engines.llama_api import Llama, cores
from llama3v.engines.llama_batch import Batch
from llama3v.engines.llamacpp import LlamaCppEngine, LlamaReader
from llama3v.engines.prefix import Caches, Prompt
from llama3v.engines.torch import TorchEngine
from llama3v.model.prompt import Rendered, Turn

PACKAGES = ("transformers", "xllamacpp", "openvino")
PROMPT_TOKENS = 16
LIMIT_SECONDS = 2.5  # start-up


@dataclass
class Options:
    """What to run."""

    llm: str
    """A small LLM: a GGUF file, a directory or a hub name."""
    work: Path = Path("runs/decode")
    """Where the models are written; those that are there are used."""
    json: Path | None = None
    """File for the results."""
    new_tokens: int = 64
    """Tokens of each decode."""
    rounds: int = 7
    """Rounds of each comparison; medians are reported."""
    prepare: bool = False
    """Only write the models."""


def main(options: Options) -> list[dict[str, Any]]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    model, pair = prepare(options.llm, options.work)
    if options.prepare:
        return []
    bandwidth = read_bandwidth()
    rows = [row("memory, bytes read per second", bandwidth / 1e9, unit="GB/s", note=f"{cores()} threads")]
    files = {"q8_0": pair / "model.gguf"}
    if options.llm.endswith(".gguf"):
        files[Path(options.llm).stem.rpartition(".")[2]] = Path(options.llm)
    for kind, path in files.items():
        rows.append(decode_in_llama_cpp(kind, path, pair, bandwidth, options))
    rows += first_tokens(pair, options)
    rows.append(decode_in_torch(model, bandwidth, options))
    rows += start_up(pair, options.rounds)
    write_results(options.json, rows, PACKAGES)
    return rows


def prepare(llm: str, work: Path) -> tuple[Path, Path]:
    """(model directory, GGUF pair in q8_0 with its tower in OpenVINO)."""
    from llama3v.model.llama3v import build_model, save_model

    model, pair, vision = work / "model", work / "pair", work / "vision"
    if not vision.exists():
        _random_tower(vision)
    if not model.exists():
        save_model(*build_model(str(vision), llm), model)
    if not pair.exists():
        with redirect_stdout(sys.stderr):
            llama3v.export(
                ExportConfig(out=pair, model=str(model), format="gguf", weights="q8_0", tower="openvino", check=False)
            )
    return model, pair


def _random_tower(directory: Path) -> None:
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 6}
    SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **shape)).save_pretrained(directory)


def decode_in_llama_cpp(kind: str, path: Path, pair: Path, bandwidth: float, options: Options) -> dict[str, Any]:
    """Tokens per second of our stream against the bare loop, in one context."""
    llm = Llama(path, context_tokens=1024)
    tokenizer = LlamaCppEngine(pair, context_tokens=256).tokenizer
    ids = list(range(1000, 1000 + PROMPT_TOKENS))
    pass_ = Bare(llm)

    def ours() -> None:
        llm.forget()
        prompt = Prompt(Rendered(list(ids), [], []), [])
        caches = Caches([LlamaReader(llm, llm.vocabulary)])
        for _ in CachedGeneration(caches, prompt, tokenizer, (), llm.vocabulary, options.new_tokens, Sampling()):
            pass

    seconds = interleaved({"ours": ours, "bare": lambda: pass_.run(ids, options.new_tokens)}, options.rounds)
    ours_rate, bare_rate = (options.new_tokens / median(seconds[side]) for side in ("ours", "bare"))
    roofline = bandwidth / path.stat().st_size
    llm.close()
    return row(
        f"decode, llama.cpp, {kind}: our stream against the bare loop",
        ours_rate,
        bare_rate,
        limit=roofline,
        unit="tokens/s",
        note=f"{ours_rate / roofline:.0%} of the roofline; {PROMPT_TOKENS} tokens of prompt in both",
    )


class Bare:
    """llama_decode in a loop, with nothing around it."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._lib: Any = llm._lib

    def run(self, ids: list[int], new_tokens: int) -> None:
        self._llm.forget()
        self._llm.read(0, ids)
        batch = Batch(1)
        batch.tokens([0])
        batch.places(0, 0)
        structure = batch.want(1)
        for place in range(len(ids), len(ids) + new_tokens - 1):  # the prompt gave the first token
            structure.token[0], structure.pos[0] = place % 1000, place
            if self._lib.llama_decode(self._llm._context, structure):
                raise SystemExit("llama_decode failed")


def first_tokens(pair: Path, options: Options) -> list[dict[str, Any]]:
    """Seconds to the first token: with the image seen already, and with a new one."""
    engine = LlamaCppEngine(pair, context_tokens=2048)
    pictures = (_picture(seed) for seed in range(10_000))
    shown = next(pictures)
    first = [0.0]

    def ask(text: str, images: list[Image.Image]) -> float:
        turns = [Turn("user", text, tuple(range(len(images))))]
        started = time.perf_counter()
        generation = engine.generate(turns, images, max_new_tokens=1)
        list(generation)
        first[0] = time.perf_counter() - started
        return first[0]

    def fresh(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (engine.llm.forget(), setattr(engine, "_caches", _new_caches(engine)), call())[-1]

    questions = (f"What is number {n} of the things on the table here?" for n in range(100_000))
    ask(next(questions), [shown])
    seen, text = [], []
    for _ in range(options.rounds + 1):
        ask(next(questions), [shown])  # the cache holds the image again
        seen.append(ask(next(questions), [shown]))
        text.append(fresh(lambda: ask(next(questions), []))())
    whole, tower, prefill = [], [], []
    for _ in range(options.rounds + 1):
        picture = next(pictures)
        whole.append(fresh(lambda picture=picture: ask(next(questions), [picture]))())
        other = next(pictures)
        started = time.perf_counter()
        engine._look_at(other).visual_tokens()
        tower.append(time.perf_counter() - started)
        prefill.append(fresh(lambda other=other: ask(next(questions), [other]))())
    counts = engine.generate([Turn("user", next(questions), (0,))], [shown], max_new_tokens=1).counts
    alone = median(t + p for t, p in zip(tower[1:], prefill[1:], strict=True))
    note = f"{counts.visual_tokens} visual of {counts.prompt_tokens} tokens"
    return [
        row(
            "first token, image seen already, against a question without one",
            1e3 * median(seen[1:]),
            1e3 * median(text[1:]),
            unit="ms",
            note=f"{note}; at most 1.2 times is wanted",
        ),
        row(
            "first token, new image, against tower alone + prefill alone",
            1e3 * median(whole[1:]),
            1e3 * alone,
            unit="ms",
            note=f"{note}; tower {1e3 * median(tower[1:]):.0f} ms; at most 1.15 times is wanted",
        ),
    ]


def _new_caches(engine: LlamaCppEngine) -> Caches:
    return Caches([LlamaReader(engine.llm, engine.renderer.image_token_id)])


def decode_in_torch(model: Path, bandwidth: float, options: Options) -> dict[str, Any]:
    """Tokens per second of our stream against transformers' generate on the same model, in fp32."""
    import torch

    engine = TorchEngine(model, device="cpu")
    engine.renderer.stop_ids = ()
    turns = [Turn("user", "Count from one to a hundred in words.")]
    ids = torch.tensor([engine.renderer.render(turns, generate=True).ids])

    def ours() -> None:
        engine._caches._caches[0].cells.clear()
        engine._caches._caches[0].reader.forget(0)
        list(engine.generate(turns, max_new_tokens=options.new_tokens))

    def theirs() -> None:
        options_ = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
        engine.model.llm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options_)

    seconds = interleaved({"ours": ours, "theirs": theirs}, max(3, options.rounds // 2))
    ours_rate, peer_rate = (options.new_tokens / median(seconds[side]) for side in ("ours", "theirs"))
    read = sum(parameter.nbytes for parameter in engine.model.llm.parameters())  # a tied head once
    roofline = bandwidth / read
    return row(
        "decode, torch, fp32: our stream against transformers' generate",
        ours_rate,
        peer_rate,
        limit=roofline,
        unit="tokens/s",
        note=f"{ours_rate / roofline:.0%} of the roofline; {ids.shape[1]} tokens of prompt in both",
    )


def start_up(pair: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a whole `llama3v ask` in a new process (an image, one token), and without tower and LLM at work."""
    photo = pair.parent / "photo.png"
    _picture(0).save(photo)
    program = (
        "import sys; from llama3v.cli import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "ask", str(photo), "What is it?", "--detail", "low", "--json"]
    command += ["--model", str(pair), "--max-new-tokens", "1"]
    seconds, work, with_torch = [], [], "False"
    for _ in range(max(3, rounds)):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        said = json.loads(done.stdout)
        work.append((said["vision_seconds"], said["prefill_seconds"]))
        with_torch = done.stderr.split()[-1]
    tower, prompt = (median(values) for values in zip(*work, strict=True))
    alone = median(whole - sum(parts) for whole, parts in zip(seconds, work, strict=True))
    note = (
        f"llama.cpp and OpenVINO, one tile; {'torch was imported' if with_torch == 'True' else 'torch is not imported'}"
    )
    parts = f"the rest: tower {tower:.2f} s, reading {said['prompt_tokens']} tokens {prompt:.2f} s"
    return [
        row("start-up: a whole `ask` in a new process", median(seconds), limit=LIMIT_SECONDS, unit="s", note=note),
        row("start-up alone: the same until tower and LLM work, and the end", alone, unit="s", note=parts),
    ]


def read_bandwidth(gigabytes: float = 0.5) -> float:
    """Bytes per second that all cores read together, from memory far larger than caches."""
    count = cores()
    parts = [np.ones(int(gigabytes * 2**30 / 8 / count)) for _ in range(count)]
    best = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(6):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))  # NumPy lets go of Python's lock meanwhile
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def _picture(seed: int) -> Image.Image:
    patches = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((380, 380), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
