"""lmms-eval runs a Llama 3-V through its plug-in, on a task from local files, and gives the score of `llama3v eval`.

    python examples/with_lmms_eval.py --model runs/quickstart --out runs/lmms-eval

makes an environment of its own for lmms-eval in --out (it wants packages that this one does not need), draws questions about
synthetic scenes, has both programs ask the model, and compares score by score and answer by answer. Nothing but packages is
downloaded.
"""

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import llama3v
from llama3v.evaluate.records import read_records
from llama3v.evaluate.specs import LoadedTask, load, parse_specs

REPOSITORY = Path(__file__).parents[1]
TASK = "llama3v_probes"
# What it imports to run a task from files; a plain `pip install lmms-eval` also brings torchvision, video and audio.
NEEDS = [
    "loguru",
    "jsonlines",
    "pytablewriter",
    "sacrebleu",
    "scikit-learn",
    "datasets",
    "evaluate",
    "python-dotenv",
    "tenacity",
    "sympy",
    "tiktoken",
    "zss",
    "tqdm-multiprocess",
    "pyyaml",
    "openpyxl",
    "httpx",
    "einops",
    "ftfy",
    "numexpr",
    "zstandard",
    "aiohttp",
]
YAML = """task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: {length}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """import io

from PIL import Image


def pictures(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    plain = [text.strip().rstrip(".").lower() for text in (results[0], doc["answer"])]
    return {"exact_match": float(plain[0] == plain[1])}
"""


@dataclass(frozen=True)
class Options:
    model: str = "runs/quickstart"
    """A Llama 3-V model directory."""
    out: Path = Path("runs/lmms-eval")
    """Directory for the environment, the task's files and both programs' results."""
    limit: int = 120
    """Questions."""
    python: str = ""
    """Python of an environment that has lmms-eval and this package; default: one that is made here."""


def main(options: Options) -> None:
    out = options.out.resolve()
    python = options.python or install(out / "environment")
    one = load(parse_specs(["probes"], None)[0], options.limit)
    write_task(one, out / "task")
    program = [python, "-m", "lmms_eval", "--model", "llama3v", "--model_args", f"pretrained={options.model}"]
    files = ["--include_path", str(out / "task"), "--output_path", str(out / "theirs"), "--log_samples"]
    subprocess.run([*program, "--tasks", TASK, "--batch_size", "16", *files], check=True)
    config = llama3v.EvalConfig(
        model=options.model, tasks=("probes",), limit=options.limit, out=out / "ours", controls=False
    )
    ours = llama3v.eval(config)["tasks"][0]["conditions"]["right image"]["figures"]["accuracy"]["value"]
    theirs = result_of(out / "theirs")
    same, answers = agreement(out)
    print(f"llama3v eval: {ours:.4f}   lmms-eval: {theirs:.4f}   equal answers: {same} of {answers}")
    sys.exit(0 if abs(ours - theirs) < 1e-9 else 1)


def install(directory: Path) -> str:
    """An environment with this package and lmms-eval; returns its Python."""
    python = str(directory / "bin" / "python")
    if not Path(python).exists():
        venv.create(directory, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q"]
    pinned = ["-c", str(REPOSITORY / "constraints.txt")]
    subprocess.run([*pip, *pinned, f"{REPOSITORY}[captions,api,parquet]", *NEEDS], check=True)
    subprocess.run([*pip, "--no-deps", "lmms-eval==0.7.3"], check=True)
    return python


def write_task(one: LoadedTask, directory: Path) -> None:
    """The questions in a form that lmms-eval reads: parquet, a YAML file and three functions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": sample.id,
            "image": {"bytes": sample.images[0].read()},
            "question": sample.prompt,
            "answer": sample.references[0],
        }
        for sample in one.samples
    ]
    pq.write_table(pa.Table.from_pylist(rows), directory / "test.parquet")
    text = YAML.format(task=TASK, data=directory / "test.parquet", length=one.task.max_new_tokens)
    (directory / f"{TASK}.yaml").write_text(text)
    (directory / "utils.py").write_text(UTILS)


def newest(directory: Path, pattern: str) -> Path:
    return max(directory.rglob(pattern), key=lambda path: path.stat().st_mtime)


def result_of(directory: Path) -> float:
    scores: dict[str, Any] = json.loads(newest(directory, "*results.json").read_text())["results"][TASK]
    return float(scores["exact_match,none"])


def agreement(out: Path) -> tuple[int, int]:
    """(answers that are the same, answers)."""
    lines = newest(out / "theirs", f"*samples_{TASK}.jsonl").read_text().splitlines()
    theirs = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, lines)}
    ours = [record.answer for record in read_records(out / "ours" / "samples" / "probes.jsonl")]
    return sum(theirs[number] == answer for number, answer in enumerate(ours)), len(ours)


if __name__ == "__main__":
    main(tyro.cli(Options))
