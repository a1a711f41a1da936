"""`llama3v eval` and `compare`, as a user runs them: files, table, resumption, whose answers they are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llama3v
from llama3v import cli
from llama3v.config import EvalConfig
from llama3v.engines.base import Question
from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.records import read_records
from llama3v.evaluate.specs import load, parse_specs
from llama3v.evaluate.subject import model_digest
from llama3v.evaluate.tasks import open_task
from tests.endpoint import endpoint

LIMIT = 72  # questions, about a dozen scenes


class Knowing:
    """Answers the probes whose picture it is shown, all but every `misses`-th."""

    def __init__(self, misses: int = 0) -> None:
        samples = list(open_task("probes").samples(LIMIT))
        self.known = {
            (one.images[0].read(), one.prompt): one.references[0]
            for number, one in enumerate(samples)
            if not misses or number % misses
        }
        self.asked = 0

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        self.asked += len(questions)
        return [self.known.get((images[0] if images else b"", turns[0].text), "?") for turns, images in questions]


def options(out: Path, **others: Any) -> EvalConfig:
    return EvalConfig(**{"tasks": ("probes",), "model": "named", "out": out, "limit": LIMIT} | others)


def test_eval_leaves_answers_scores_and_a_summary_that_says_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = llama3v.eval(options(tmp_path), Knowing())
    row = summary["tasks"][0]
    assert row["conditions"]["right image"]["figures"]["accuracy"]["value"] == 1.0
    assert row["differences"]["wrong image"]["p_value"] < 0.01
    assert row["prompt"] == next(iter(open_task("probes").samples(1))).prompt
    assert len(row["data_digest"]) == 32
    assert summary["environment"]["torch"]
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    records = read_records(tmp_path / "samples" / "probes.jsonl")
    assert [record.condition for record in records].count("blind") == LIMIT
    shown = capsys.readouterr().out
    assert re.search(r"1\.000 \[0\.\d{3}, 1\.000\]", shown)
    assert f"The first {LIMIT} samples" in shown


def test_a_second_run_asks_nothing_and_more_samples_ask_the_new_ones_alone(tmp_path: Path) -> None:
    llama3v.eval(options(tmp_path, limit=12), Knowing())
    again, more = Knowing(), Knowing()
    llama3v.eval(options(tmp_path, limit=12), again)
    assert again.asked == 0
    summary = llama3v.eval(options(tmp_path), more)
    # Besides the new ones: those about the last picture, whose wrong image is another one now.
    assert 3 * (LIMIT - 12) <= more.asked < 3 * (LIMIT - 12) + 12
    whole = llama3v.eval(options(tmp_path / "whole"), Knowing())
    assert summary["tasks"][0]["conditions"] == whole["tasks"][0]["conditions"]


def test_without_controls_the_output_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Knowing()
    summary = llama3v.eval(options(tmp_path, controls=False), engine)
    assert engine.asked == LIMIT
    assert list(summary["tasks"][0]["conditions"]) == ["right image"]
    shown = capsys.readouterr().out
    assert "not asked" in shown
    assert "how much of these scores is sight was not measured" in shown


def test_a_directory_of_another_models_answers_is_refused(tmp_path: Path) -> None:
    llama3v.eval(options(tmp_path), Knowing())
    with pytest.raises(ConfigError, match=r"another run \(another model\)"):
        llama3v.eval(options(tmp_path, model="other"), Knowing())


def test_compare_tells_two_runs_apart_and_refuses_other_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama3v.eval(options(tmp_path / "a"), Knowing())
    llama3v.eval(options(tmp_path / "b"), Knowing(misses=2))
    llama3v.eval(options(tmp_path / "c", limit=12), Knowing())
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "ab")]) == 0
    row = json.loads((tmp_path / "ab" / "summary.json").read_text())["tasks"][0]
    assert (row["first"], row["second"], row["first_better"], row["second_better"]) == (1.0, 0.5, LIMIT // 2, 0)
    assert row["p_value"] < 0.05
    assert "+0.500" in capsys.readouterr().out
    with pytest.raises(DataError, match="same data and --limit"):
        llama3v.compare(llama3v.CompareConfig(tmp_path / "a", tmp_path / "c"))


def test_an_endpoint_is_measured_by_the_same_code(tmp_path: Path) -> None:
    def reply(asked: dict[str, Any]) -> tuple[int, str]:
        return 200, "red" if isinstance(asked["messages"][0]["content"], list) else "blind"

    with endpoint(reply) as server:
        arguments = ["--url", server.url, "--api-model", "peer", "--tasks", "probes", "--limit", "8"]
        assert cli.main(["eval", *arguments, "--out", str(tmp_path)]) == 0
    assert len(server.requests) == 24
    assert {record.answer for record in read_records(tmp_path / "answers" / "probes.jsonl")} == {"red", "blind"}
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == "peer"


def test_data_is_looked_for_in_its_folder_first(tmp_path: Path) -> None:
    (tmp_path / "pope.json").write_text('{"question": "Is there a cat?", "label": "yes", "image": "1.jpg"}\n')
    (tmp_path / "mine.jsonl").write_text('{"question": "Is there a dog?", "label": "no", "image": "1.jpg"}\n')
    own, other = parse_specs(["pope,pope:mine=mine.jsonl"], tmp_path)
    assert (own.label, load(own, None).samples[0].references) == ("pope", ("yes",))
    assert (other.label, load(other, None).samples[0].references) == ("mine", ("no",))
    assert parse_specs(["probes"], tmp_path)[0].where is None
    assert parse_specs(["pope=lmms-lab/POPE"], tmp_path)[0].where == "lmms-lab/POPE"


@pytest.mark.parametrize(
    ("tasks", "kind", "text"),
    [
        (["nothing"], ConfigError, "expected a task out of mmmu"),
        (["short=a", "short=b"], ConfigError, "short:LABEL=PATH"),
        (["short:a b=c"], ConfigError, "label of letters"),
        (["mmmu"], DataError, "give its place as mmmu=PATH"),
        ([" "], ConfigError, "--tasks is empty"),
    ],
)
def test_tasks_that_cannot_be_meant_are_told(
    tasks: list[str], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        parse_specs(tasks, tmp_path)


def test_options_that_have_no_meaning_together_are_refused(tmp_path: Path) -> None:
    for others in (
        {"model": None},
        {"url": "http://x/v1"},
        {"model": None, "url": "http://x/v1"},
        {"model": None, "url": "http://x/v1", "api_model": "a", "cache": tmp_path},
        {"model": None, "url": "http://x/v1", "api_model": "a", "detail": "both"},
        {"limit": 0},
    ):
        with pytest.raises(ConfigError):
            options(tmp_path, **others)


def test_the_digest_of_a_model_is_of_its_content_wherever_it_lies(tmp_path: Path) -> None:
    for name, last in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(9 << 20) + bytes([last]) * (1 << 20))
    one, same, other = (model_digest(tmp_path / name) for name in "abc")
    assert one == same != other
    assert model_digest(None) is None


def test_cached_features_and_overviews_reach_the_engine(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One model, three ways: images, cached features, and its overviews beside both."""
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number, one in enumerate(dict.fromkeys(sample.images[0] for sample in open_task("probes").samples(18))):
        (scenes / f"{number}.png").write_bytes(one.read())
    llama3v.encode(llama3v.EncodeConfig(data=str(scenes), vision=str(tiny_model_dir), cache=tmp_path / "cache"))
    live = options(tmp_path / "live", model=str(tiny_model_dir), limit=18, detail="both")
    cached = options(tmp_path / "cached", model=str(tiny_model_dir), limit=18, detail="both", cache=tmp_path / "cache")
    first, second = llama3v.eval(live), llama3v.eval(cached)
    assert first["features_from_cache"] == 0
    assert second["features_from_cache"] == 18 * 3  # right, wrong, overview; not blind
    answers = [
        {record.key: record.answer for record in read_records(tmp_path / run / "samples" / "probes.jsonl")}
        for run in ("live", "cached")
    ]
    same = [answers[0][key] == answers[1][key] for key in answers[0]]
    assert sum(same) > 0.8 * len(same)  # cached features are rounded to bf16
    overviews = [answers[1][key] for key in answers[1] if key[1] == "overview only"]
    assert overviews != [answers[1]["probes", "right image", key[2]] for key in answers[1] if key[1] == "overview only"]
    assert "slices changed accuracy by" in capsys.readouterr().out
