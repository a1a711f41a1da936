"""LLaVA-Bench: what the judge reads, how its verdict is read, and that no answer is judged twice."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import llama3v
from llama3v.config import CompareConfig, EvalConfig
from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.tasks import open_task
from llama3v.evaluate.tasks.base import TaskSample
from llama3v.evaluate.tasks.llava_bench import parse_verdict
from tests.endpoint import Endpoint, endpoint


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Three questions about two pictures in LLaVA's own files."""
    folder = tmp_path / "bench"
    (folder / "images").mkdir(parents=True)
    for name in ("001.png", "002.png"):
        file = BytesIO()
        Image.new("RGB", (8, 8), "red" if name == "001.png" else "blue").save(file, "PNG")
        (folder / "images" / name).write_bytes(file.getvalue())
    rows = [("0", "001.png", "conv"), ("1", "001.png", "detail"), ("2", "002.png", "conv")]
    files = {
        "questions": [{"question_id": int(i), "image": n, "category": c, "text": f"What is {i}?"} for i, n, c in rows],
        "context": [{"image": n, "caption": f"A picture {n}."} for n in ("001.png", "002.png")],
        "answers_gpt4": [{"question_id": int(i), "text": f"It is {i}."} for i, _, _ in rows],
    }
    for name, some in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


class Talking:
    def answer_batch(self, questions: Any, *, max_new_tokens: int) -> list[str]:
        return [f"{'I see' if images else 'blind:'} {turns[0].text}" for turns, images in questions]


def verdict(asked: dict[str, Any]) -> tuple[int, str]:
    system, question = asked["messages"]
    assert system["role"] == "system"
    ours = question["content"].split("[Assistant 2]\n")[1]
    return 200, "8 6\nGood." if ours.startswith("I see") else "8 2" if "What is 0" in ours else "I cannot say"


def options(bench: Path, out: Path, judge: Endpoint | None) -> EvalConfig:
    named = {"judge_url": judge.url, "judge_model": "sage"} if judge else {}
    return EvalConfig(model="named", tasks=(f"llavabench={bench}",), out=out, **named)


def test_the_score_is_our_points_over_the_references_and_the_judge_is_named(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(verdict) as judge:
        row = llama3v.eval(options(bench, tmp_path / "out", judge), Talking())["tasks"][0]
        judged = len(judge.requests)
        again = llama3v.eval(options(bench, tmp_path / "out", judge), Talking())["tasks"][0]
        assert len(judge.requests) == judged == 6  # with the wrong image it says the same as with the right one
    right, blind = row["conditions"]["right image"], row["conditions"]["blind"]
    assert right["figures"][row["figure"]]["value"] == pytest.approx(18 / 24)
    assert set(right["categories"]) == {"conv", "detail"}
    assert (blind["figures"][row["figure"]]["value"], blind["unparsed"]) == (0.25, pytest.approx(2 / 3))
    assert row["differences"]["blind"]["difference"]["value"] == pytest.approx(18 / 24 - 0.25)  # of the figures
    assert again["conditions"] == row["conditions"]
    assert f"judged by sage at {judge.url}" in " ".join(capsys.readouterr().out.split())


def test_without_a_readable_verdict_there_is_no_score(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(lambda asked: (200, "I cannot say")) as judge:
        row = llama3v.eval(options(bench, tmp_path / "out", judge), Talking())["tasks"][0]
    assert (row["conditions"]["right image"]["figures"], row["conditions"]["right image"]["unparsed"]) == ({}, 1.0)
    assert row["differences"] == {}
    assert "–" in capsys.readouterr().out
    assert "no answer counts" in (tmp_path / "out" / "eval.html").read_text()
    runs = CompareConfig(tmp_path / "out", tmp_path / "out")
    with pytest.raises(DataError, match="not defined in both runs"):
        llama3v.compare(runs)


def test_the_judge_reads_context_question_reference_and_answer_in_the_benchmarks_form(bench: Path) -> None:
    task = open_task(f"llavabench={bench}")
    text = task.question_for_judge(next(iter(task.samples(1))), "Ours.")
    begin = (
        "[Context]\nA picture 001.png.\n\n[Question]\nWhat is 0?\n\n[Assistant 1]\nIt is 0.\n\n[End of Assistant 1]\n\n"
    )
    assert text.startswith(begin + "[Assistant 2]\nOurs.\n\n[End of Assistant 2]\n\n[System]\nWe would like to request")


@pytest.mark.parametrize(
    ("review", "scores"),
    [("8 7\nBecause", (8, 7)), ("8, 7", None), ("9,7.5", (9, 7.5)), ("Scores: 8 7", None), ("", None), ("11 3", None)],
)
def test_a_verdict_is_read_as_the_benchmark_reads_it(review: str, scores: tuple[float, float] | None) -> None:
    assert parse_verdict(review) == scores


def test_another_reference_is_judged_anew(bench: Path, tmp_path: Path) -> None:
    with endpoint(verdict) as judge:
        llama3v.eval(options(bench, tmp_path / "out", judge), Talking())
        file = bench / "answers_gpt4.jsonl"
        file.write_text(file.read_text().replace("It is 2.", "It is two."))
        llama3v.eval(options(bench, tmp_path / "out", judge), Talking())
    assert len(judge.requests) == 6 + 2
    assert "It is two." in judge.requests[-1]["messages"][1]["content"]


@pytest.fixture
def mmbench(tmp_path: Path) -> Path:
    """Two questions, the first in two rotations."""
    file = BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"],
        ["3", "Which", "nan", "a fox", "a cow", "", "", "B", "animals", picture],
        ["4", "Who", "nan", "Ann", "Bob", "Cid", "Dan", "B", "people", picture],
        ["1000003", "Which", "nan", "a cow", "a fox", "", "", "A", "animals", "3"],
    ]
    path = tmp_path / "MMBench_DEV_EN.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


class Farmer:
    """Names no option of the first question; the second's it does."""

    def answer_batch(self, questions: Any, *, max_new_tokens: int) -> list[str]:
        return ["B" if "Who" in turns[0].text else "It is cattle." for turns, _ in questions]


def test_mmbench_asks_the_judge_about_what_matches_no_option_and_is_wrong_there_without_one(
    mmbench: Path, tmp_path: Path
) -> None:
    def match(asked: dict[str, Any]) -> tuple[int, str]:
        (question,) = asked["messages"]  # no system prompt
        last = question["content"].split("Example 3: \n")[1]
        assert last.endswith("Answer: It is cattle.\nYour output: ")
        return 200, "B" if last.startswith(
            "Question: Which?\nOptions: There are several options: \nA. a fox\nB. a cow\n\nAnswer:"
        ) else "A"

    options = EvalConfig(model="named", tasks=(f"mmbench={mmbench}",), out=tmp_path / "alone", controls=False)
    alone = llama3v.eval(options, Farmer())["tasks"][0]
    with endpoint(match) as judge:
        named = replace(options, out=tmp_path / "judged", judge_url=judge.url, judge_model="sage")
        judged = llama3v.eval(named, Farmer())["tasks"][0]
    found = [row["conditions"]["right image"] for row in (alone, judged)]
    assert [one["figures"][alone["figure"]]["value"] for one in found] == [0.5, 1.0]
    assert [one["unparsed"] for one in found] == [pytest.approx(2 / 3), 0.0]
    assert (alone.get("judge"), judged["judge"]) == (None, f"sage at {judge.url}")
    assert len(judge.requests) == 2
    pages = [" ".join((tmp_path / name / "eval.html").read_text().split()) for name in ("alone", "judged")]
    assert "Our MMB has no judge" in pages[0]
    assert f"were read by sage at {judge.url}" in pages[1]
    assert all("MMB dev" in page for page in pages)
    with pytest.raises(DataError, match="judge both by one"):
        llama3v.compare(CompareConfig(tmp_path / "alone", tmp_path / "judged"))


def test_a_judge_that_finds_no_option_leaves_the_answer_wrong(mmbench: Path) -> None:
    task = open_task(f"mmbench={mmbench}")
    sample = next(iter(task.samples(1)))
    record = AnswerRecord("mmbench", sample.id, "right image", "", "", (), "", "x", None, sample.references, 0.0)
    assert [task.judged_record(record, sample, review).parsed for review in ("E", "B.", "I cannot say")] == [
        "E",
        "B",
        None,
    ]
    assert [task.judged_record(record, sample, review).score for review in ("E", "B.", "I cannot say")] == [0, 1, 0]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(["8", "9.5", "-1", "nan", "inf", "1e400", "11", " ", ",", "\n", "A", "٣", "_"]), max_size=8
        ).map("".join),
    )
)
def test_no_review_crashes_the_parser_of_verdicts_or_leaves_the_range(review: str) -> None:
    found = parse_verdict(review)
    assert found is None or all(0 <= one <= 10 for one in found)
    task = open_task("llavabench=unread")
    record = AnswerRecord("llavabench", "1", "right image", "", "", (), "", "x", "x", ("",), 0.0)
    made = task.judged_record(record, TaskSample("1", (), "", ("",)), review)
    assert 0 <= made.score <= 1
    assert AnswerRecord.from_json(made.to_json()).score == made.score


def test_without_a_judge_nothing_is_asked(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--judge-url URL"):
        llama3v.eval(options(bench, tmp_path / "out", None), Talking())
    assert not (tmp_path / "out").exists()
