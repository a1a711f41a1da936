"""Benchmarks read from small look-alikes of their public files, their figures, and answers that no one would expect."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.records import AnswerRecord, append_records, read_records, unparsed_share
from llama3v.evaluate.summary import summarise
from llama3v.evaluate.tasks import TASKS, open_task
from llama3v.evaluate.tasks.base import Task, TaskSample
from llama3v.evaluate.tasks.rows import find_files

pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = picture("red"), picture("blue")
CHOICES = ["a fox", "a cow"]


def hub_image(data: bytes = RED) -> dict[str, Any]:
    return {"bytes": data, "path": "x.png"}


MMMU = {
    "options": "['a fox', 'a cow']",
    "question_type": "multiple-choice",
    "image_1": hub_image(),
    "image_2": hub_image(BLUE),
}
VISTA = {"choices": None, "unit": None, "precision": 1.0, "image": "images/1.jpg", "decoded_image": hub_image()}
FILES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mmmu": (
        "Art_Theory/validation-00000-of-00001.parquet",
        [
            {**MMMU, "id": "validation_Art_Theory_1", "question": "Which, <image 2> or <image 1>?", "answer": "B"},
            {**MMMU, "id": "validation_Art_Theory_2", "question": "<image 1> How many?", "answer": "['3.429', '24/7']",
             "question_type": "open", "options": "[]"},
        ],
    ),
    "mathvista": (
        "data/testmini-00000-of-00001.parquet",
        [
            {**VISTA, "pid": "1", "question": "How far?", "answer_type": "float", "answer": "2.5", "unit": "m",
             "metadata": {"task": "geometry"}},
            {**VISTA, "pid": "2", "question": "Which?", "choices": CHOICES, "answer_type": "text", "answer": "a cow",
             "metadata": {"task": "figures"}},
        ],
    ),
    "ai2d": ("data/test-00000-of-00001.parquet", [{"question": "Q?", "options": CHOICES, "answer": "1", "image": hub_image()}]),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        [
            {"type": "human_test", "question": "How many?", "answer": "100", "image": hub_image()},
            {"type": "augmented_test", "question": "Which?", "answer": "Peru", "image": hub_image()},
        ],
    ),
    "docvqa": (
        "DocVQA/validation-00000-of-00001.parquet",
        [{"questionId": "7", "question": "Date?", "question_types": ["form"], "image": hub_image(), "docId": 3,
          "ucsf_document_id": "x", "ucsf_document_page_no": "1", "answers": ["1 May 1999", "May 1, 1999"]}],
    ),
    "textvqa": (
        "data/validation-00000-of-00001.parquet",
        [{"question_id": 5, "image_id": "i1", "question": "what BRAND is it?", "answers": ["Nokia"] * 9 + ["phone"],
          "image": hub_image()}],
    ),
    "vqav2": (
        "data/validation-00000-of-00001.parquet",
        [{"question_id": 5, "image_id": 9, "question": "How many?", "answer_type": "number", "image": hub_image(),
          "answers": [{"answer": "2", "answer_id": n} for n in range(10)]}],
    ),
    "scienceqa": (
        "ScienceQA-IMG/test-00000-of-00001.parquet",
        [
            {"image": hub_image(), "question": "Q?", "choices": CHOICES, "answer": 1, "hint": "Look.", "subject": "biology"},
            {"image": None, "question": "No picture?", "choices": CHOICES, "answer": 0, "hint": "", "subject": "biology"},
        ],
    ),
    "pope": (
        "data/test-00000-of-00001.parquet",
        [{"id": str(n), "question": "Is there a dog in the image?", "answer": "yes" if n < 2 else "no", "image_source": "c1",
          "category": "random", "image": hub_image()} for n in range(4)],
    ),
    "seedbench": (
        "data/test-00000-of-00001.parquet",
        [
            {"question_id": "1_0", "data_id": "5", "data_type": "image", "question_type_id": 5, "question": "How many?", "answer": "C",
             "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "image": [hub_image()]},
            {"question_id": "1_1", "data_id": "6", "data_type": "video", "question_type_id": 10, "question": "What?", "answer": "A",
             "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "image": [hub_image(), hub_image()]},
        ],
    ),
    "llavabench": (
        "data/train-00000-of-00001.parquet",
        [{"question_id": "1", "question": "What is it?", "image": hub_image(), "image_id": "001.jpg", "category": "conv",
          "caption": "A red square.", "gpt_answer": "A square."}],
    ),
    "captions": (
        "data/test-00000-of-00001.parquet",
        [{"image": hub_image(), "caption": ["A red square.", "a square that is red"], "filename": "1.jpg"},
         {"image": hub_image(BLUE), "caption": ["Blue paper."], "filename": "2.jpg"}],
    ),
    "short": (
        "train.parquet",
        [{"images": [hub_image()], "texts": [{"user": "What colour?", "assistant": "red"}, {"user": "How many?", "assistant": "1"}]}],
    ),
}  # fmt: skip
GOOD = {
    "mmmu": ["The answer is (B)", "so x = 24/7"],
    "mathvista": ["2.5", "(B)"],
    "ai2d": ["B. a cow"],
    "chartqa": ["104", "peru"],
    "docvqa": ["1 may  1999"],
    "textvqa": ["The Nokia."],
    "vqav2": ["two"],
    "scienceqa": ["b"],
    "pope": ["Yes", "Yes, there is.", "No.", "There is not, yes"],
    "seedbench": ["C) 3"],
    "mmbench": ["B."],
    "captions": ["a red square", "blue paper"],
    "short": ["Red.", "one"],
}


@pytest.fixture
def task_of(tmp_path: Path):
    """Open a task on its look-alike."""
    import pyarrow as pa

    def make(name: str) -> Task:
        if name == "probes":
            return open_task(name)
        if name == "mmbench":
            return open_task(f"mmbench={mmbench_tsv(tmp_path / 'MMBench_DEV_EN.tsv')}")
        file, rows = FILES[name]
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return open_task(f"{name}={path if name == 'short' else tmp_path / name}")

    return make


def mmbench_tsv(path: Path) -> Path:
    """One question in two rotations, and one that stands alone."""
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"],
        ["3", "Which?", "nan", "a fox", "a cow", "", "", "B", "animals", base64.b64encode(RED).decode(), "dev"],
        ["4", "Who?", "Look.", "Ann", "Bob", "Cid", "Dan", "B", "people", base64.b64encode(BLUE).decode(), "dev"],
        ["1000003", "Which?", "nan", "a cow", "a fox", "", "", "A", "animals", "3", "dev"],
    ]
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


def record(task: Task, sample: TaskSample, answer: str) -> AnswerRecord:
    grade = task.grade(answer, sample)
    names = tuple(image.name for image in sample.images)
    head = (task.name, sample.id, "right image", sample.category, sample.cluster, names, sample.prompt, answer)
    return AnswerRecord(*head, grade.parsed, sample.references, grade.score)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_task_reads_its_public_form_and_right_answers_score_in_full(task_of, name: str) -> None:
    if name == "captions":
        pytest.importorskip("pycocoevalcap", reason="needs the extra captions")
    task = task_of(name)
    samples = list(task.samples())
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(Image.open(io.BytesIO(image.read())).size == (8, 8) for sample in samples for image in sample.images)
    assert all(sample.images and sample.prompt and sample.references for sample in samples)
    answers = ["B.", "B.", "A."] if name == "mmbench" else GOOD[name]
    grades = [task.grade(answer, sample) for sample, answer in zip(samples, answers, strict=True)]
    assert [grade.score for grade in grades] == [1.0] * len(samples)
    assert all(grade.parsed is not None for grade in grades)
    assert [one.id for one in task.samples(1)] == [samples[0].id]


def test_prompts_are_those_of_the_benchmarks(task_of) -> None:
    mmmu = list(task_of("mmmu").samples())
    assert mmmu[0].prompt == (
        "Which, <image 2> or <image 1>?\nA. a fox\nB. a cow\n\nAnswer with the option's letter from the given choices directly."
    )
    assert [image.read() for image in mmmu[0].images] == [RED, BLUE]
    assert mmmu[1].prompt == "<image 1> How many?\n\nAnswer the question using a single word or phrase."
    assert (mmmu[1].references, mmmu[1].category) == (("3.429", "24/7"), "Art Theory")
    assert next(task_of("textvqa").samples()).prompt.startswith("What brand is it?\n")
    far = "How far? (Unit: m)\nAnswer the question using a single floating-point number with one decimal place."
    assert next(task_of("mathvista").samples()).prompt == far
    mmbench = list(task_of("mmbench").samples())
    assert mmbench[0].prompt.startswith("Which? There are several options:\nA. a fox\nB. a cow\n\nAnswer with")
    assert mmbench[1].prompt.startswith("Look. Who? There are several options:\nA. Ann\n")


def test_a_rotated_question_counts_once_and_only_if_every_rotation_is_right(task_of) -> None:
    task = task_of("mmbench")
    samples = list(task.samples())
    assert samples[2].images[0].read() == RED  # the row names the row that has the picture
    records = [record(task, sample, "B") for sample in samples]
    settled = task.settle(records)
    assert [(one.id, one.score) for one in settled] == [("3", 0.0), ("4", 1.0)]
    assert task.corpus_figures(records) == {"accuracy of single rotations": pytest.approx(2 / 3), "rotations": 1.0}


def test_pope_figures_are_those_of_its_own_script(task_of) -> None:
    task = task_of("pope")
    answers = ["Yes", "No", "yes", "Maybe"]  # gold: yes, yes, no, no; an answer without either word is a yes there
    records = [record(task, *pair) for pair in zip(task.samples(), answers, strict=True)]
    figures = {name: one.value for name, one in summarise(task, records, "right image").figures.items()}
    assert figures["precision"] == pytest.approx(1 / 3)
    assert figures["recall"] == pytest.approx(1 / 2)
    assert figures["F1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert figures["accuracy"] == pytest.approx(1 / 4)
    assert figures["yes ratio"] == pytest.approx(3 / 4)
    assert unparsed_share(records) == pytest.approx(1 / 4)


def test_a_half_that_is_not_there_has_no_score(task_of) -> None:
    task = task_of("chartqa")
    human = [record(task, sample, "100") for sample in task.samples() if sample.category == "human"]
    assert set(summarise(task, human, "right image").figures) == {"relaxed accuracy", "human"}


def test_six_right_answers_of_pope_do_not_make_it_certain(task_of) -> None:
    task = task_of("pope")
    sample = next(task.samples())
    alone = [replace(record(task, sample, "Yes"), id=str(number), cluster="") for number in range(6)]
    figures = summarise(task, alone, "right image").figures
    certain = {"accuracy", "F1", "precision", "recall", "yes ratio", "strict accuracy", "F1, random"}
    assert set(figures) == certain  # no F1 of settings that are not there, nor their mean
    for one in figures.values():
        assert (one.value, one.low) == (1.0, pytest.approx(0.025 ** (1 / 6)))


def test_an_unparsed_option_is_drawn_by_the_sample_alone_and_stays_unparsed(task_of) -> None:
    task = task_of("mmmu")
    sample = next(task.samples())
    grades = [task.grade("no idea", sample) for _ in range(3)]
    assert [grade.parsed for grade in grades] == [None] * 3
    assert len({grade.score for grade in grades}) == 1


def test_caption_figures_rank_the_right_image_over_the_wrong_one(task_of) -> None:
    pytest.importorskip("pycocoevalcap", reason="needs the extra captions")
    task = task_of("captions")
    samples = list(task.samples())
    right = task.settle([record(task, s, a) for s, a in zip(samples, GOOD["captions"], strict=True)])
    wrong = task.settle([record(task, s, a) for s, a in zip(samples, GOOD["captions"][::-1], strict=True)])
    assert min(one.score for one in right) > 1 > max(one.score for one in wrong)
    assert set(task.corpus_figures(right)) == {
        "BLEU-1",
        "BLEU-2",
        "BLEU-3",
        "BLEU-4",
        "ROUGE-L",
        "METEOR (exact and stem)",
    }


@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_answer_crashes_a_parser_or_leaves_the_range(task_of, name: str) -> None:
    if name == "captions":
        pytest.importorskip("pycocoevalcap", reason="needs the extra captions")
    task = task_of(name)
    samples = list(task.samples(3))
    pieces = st.sampled_from(
        [
            "A",
            "B.",
            "(C)",
            "yes",
            "No,",
            "1,000",
            "1e999",
            "nan",
            "inf",
            "%",
            ".",
            "\n",
            "is ",
            "=",
            '"',
            "\\",
            "İ",
            "ß",
        ]
    )
    texts = st.one_of(
        st.text(max_size=60), st.lists(pieces, max_size=12).map("".join), st.lists(pieces, max_size=12).map(" ".join)
    )

    @settings(max_examples=60, deadline=None)
    @given(texts)
    def check(answer: str) -> None:
        for sample in samples:
            made = record(task, sample, answer)
            assert 0 <= made.score <= 1
            assert AnswerRecord.from_json(made.to_json()).key == made.key

    check()


def test_llava_json_gives_one_sample_an_image_with_all_its_captions(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(RED)
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "Red."}]
    rows = [{"id": str(n), "image": f"{1 + n // 2}.png", "conversations": turns} for n in range(3)]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    samples = list(open_task(f"captions={tmp_path}").samples())
    assert [(one.id, len(one.references), one.prompt) for one in samples] == [
        ("1.png", 2, "Describe."),
        ("2.png", 1, "Describe."),
    ]


def test_json_forms_name_pictures_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "c.jpg").write_bytes(RED)
    line = {"question_id": 1, "image": "c.jpg", "text": "Is there a dog in the image?", "label": "no"}
    (tmp_path / "coco_pope_random.json").write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "question_id": 2}) + "\n"
    )
    samples = list(open_task(f"pope={tmp_path}").samples())
    assert [(one.category, one.references, one.images[0].read()) for one in samples] == [("random", ("no",), RED)] * 2
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(BLUE)
    (tmp_path / "questions.json").write_text(json.dumps([["is it blue?", "yes", 0]]))
    (easy,) = open_task(f"short={tmp_path / 'questions.json'}").samples()
    assert (easy.images[0].read(), easy.references, easy.category) == (BLUE, ("yes",), "yes or no")


def test_errors_say_what_was_expected_and_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a task out of mmmu"):
        open_task("mmlu")
    with pytest.raises(DataError, match="give a path: short=PATH"):
        open_task("short")
    with pytest.raises(DataError, match="expected a file like"):
        list(open_task(f"pope={tmp_path}").samples())
    with pytest.raises(DataError, match="no such file or folder"):
        list(open_task("pope=./nowhere").samples())
    (tmp_path / "x.json").write_text('[{"question": "?"}]')
    with pytest.raises(
        DataError, match=r"x.json#0: expected a column id or question_id, found question|expected images"
    ):
        list(open_task(f"pope={tmp_path / 'x.json'}").samples())


def shards(folder: str, *splits: str) -> list[str]:
    return [f"{folder}/{split}-{number:05}-of-00002.parquet" for split in splits for number in range(2)]


HUB = {
    "mmmu": ("lmms-lab/MMMU", shards("data", "dev", "test", "validation"), "data/validation-"),
    "mmmu=MMMU/MMMU": (
        "MMMU/MMMU",
        [*shards("Art", "dev", "test", "validation"), *shards("Art_Theory", "dev", "test", "validation")],
        "Art/validation- Art_Theory/validation-",
    ),
    "mathvista": ("AI4Math/MathVista", shards("data", "test", "testmini"), "data/testmini-"),
    "ai2d": ("lmms-lab/ai2d", shards("data", "test"), "data/test-"),
    "chartqa": ("lmms-lab/ChartQA", shards("data", "test"), "data/test-"),
    "docvqa": (
        "lmms-lab/DocVQA",
        [*shards("DocVQA", "test", "validation"), *shards("InfographicVQA", "test", "validation")],
        "DocVQA/validation-",
    ),
    "textvqa": ("lmms-lab/textvqa", shards("data", "train", "test", "validation"), "data/validation-"),
    "vqav2": ("lmms-lab/VQAv2", shards("data", "test", "testdev", "validation"), "data/validation-"),
    "scienceqa": (
        "lmms-lab/ScienceQA",
        [*shards("ScienceQA-FULL", "test", "train"), *shards("ScienceQA-IMG", "test", "train", "validation")],
        "ScienceQA-IMG/test-",
    ),
    "mmbench": (
        "lmms-lab/MMBench",
        [*shards("cc", "test"), *shards("cn", "dev", "test"), *shards("en", "dev", "test")],
        "en/dev-",
    ),
    "pope": (
        "lmms-lab/POPE",
        [*shards("Full", "adversarial", "popular", "random"), *shards("data", "test")],
        "data/test-",
    ),
    "seedbench": ("lmms-lab/SEED-Bench", shards("data", "test"), "data/test-"),
    "llavabench": ("lmms-lab/llava-bench-in-the-wild", shards("data", "train"), "data/train-"),
}


@pytest.mark.parametrize("spec", sorted(HUB))
def test_a_hub_name_downloads_the_files_of_the_split_alone(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's own filter, whose "*" goes across folders."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository, files, split = HUB[spec]
    listed = [".gitattributes", "README.md", "archive/old/test-1.parquet", "archive/data/validation-1.parquet", *files]

    def download(name: str, repo_type: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, repo_type) == (repository, "dataset")
        for file in filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    task = open_task(spec)
    found = find_files(str(task.where), task.files)
    expected = [tmp_path / file for file in files if file.startswith(tuple(split.split()))]
    assert found == expected
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == expected  # and nothing else came


def test_records_survive_a_kill_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    one = AnswerRecord("t", "1", "blind", "", "", ("a",), "p", "infinity", (float("inf"), "x"), ("r",), 0.5)
    two = AnswerRecord("t", "2", "blind", "", "", (), "p", "", None, ("r",), 0.0)
    append_records(path, [one, two])
    with path.open("a") as file:
        file.write('{"task": "t", "id": "3"')
    assert [record.id for record in read_records(path)] == ["1", "2"]
    append_records(path, [two])
    assert [record.parsed for record in read_records(path)] == [("inf", "x"), None]
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1 is no answer record"):
        read_records(path)


def test_evaluation_imports_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from llama3v.evaluate.tasks import *; [open_task(n + '=x') for n in TASKS]; import llama3v.evaluate.statistics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
