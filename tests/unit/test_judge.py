"""LLaVA-Bench: what the judge reads, how its verdict is read, and that no answer is judged twice."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llama3v
from llama3v.config import CompareConfig, EvalConfig
from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.tasks import open_task
from llama3v.evaluate.tasks.llava_bench import parse_verdict, question_for_judge
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
        assert len(judge.requests) == judged == 9
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
    sample = next(iter(open_task(f"llavabench={bench}").samples(1)))
    text = question_for_judge(sample, "Ours.")
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


def test_without_a_judge_nothing_is_asked(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--judge-url URL"):
        llama3v.eval(options(bench, tmp_path / "out", None), Talking())
    assert not (tmp_path / "out").exists()
