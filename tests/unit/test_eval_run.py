"""Answering a task with an engine that is a plain function: conditions, resumption, sums and comparisons."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llama3v.data.sources.base import BytesImage
from llama3v.engines.base import Question
from llama3v.errors import DataError
from llama3v.evaluate.run import answer_task, images_shown
from llama3v.evaluate.specs import image_keys
from llama3v.evaluate.summary import compare_runs, summarise
from llama3v.evaluate.tasks import open_task
from llama3v.evaluate.tasks.base import Task, TaskSample

LIMIT = 40


class Seer:
    """Knows the answers of the probes by their picture's bytes and question; without the right picture it says "no"."""

    def __init__(self, task: Task, dies_after: int | None = None, knows: int = LIMIT) -> None:
        self.known = {(one.images[0].read(), one.prompt): one.references[0] for one in task.samples(knows)}
        self.asked = 0
        self.dies_after = dies_after

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        if self.dies_after is not None and self.asked >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += len(questions)
        return [self.known.get((images[0] if images else b"", turns[0].text), "") for turns, images in questions]


@pytest.fixture(scope="module")
def probes() -> Task:
    return open_task("probes")


def test_a_model_that_sees_scores_with_the_right_image_alone(probes: Task, tmp_path: Path) -> None:
    records = answer_task(Seer(probes), probes, tmp_path / "a.jsonl", limit=LIMIT)
    right, wrong, blind = (summarise(probes, records, name) for name in ("right image", "wrong image", "blind"))
    assert (right.figures["accuracy"].value, right.figures["accuracy"].high, right.unparsed) == (1.0, 1.0, 0.0)
    assert 0.5 < right.figures["accuracy"].low < 1.0  # all right about a few pictures proves no more
    assert wrong.figures["accuracy"].value < 0.3  # another picture may by chance have the same answer
    assert (blind.figures["accuracy"].value, blind.unparsed) == (0.0, 1.0)
    assert set(right.categories) == {record.category for record in records}


def test_a_run_that_is_killed_goes_on_where_it_stopped(probes: Task, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_task(Seer(probes, dies_after=48), probes, out, limit=LIMIT, batch=16)
    told: list[int] = []
    seer = Seer(probes)
    records = answer_task(seer, probes, out, limit=LIMIT, batch=16, advance=told.append)
    assert seer.asked == 3 * LIMIT - 56  # batches of 16, 16, 8, then 16 of the next condition had been written
    assert sum(told) == len(records) == 3 * LIMIT
    assert len(out.read_text().splitlines()) == 3 * LIMIT
    whole = answer_task(Seer(probes), probes, tmp_path / "b.jsonl", limit=LIMIT)
    assert sorted(records, key=lambda record: record.key) == sorted(whole, key=lambda record: record.key)


def test_a_wrong_image_is_never_of_the_same_picture_and_always_of_as_many(probes: Task) -> None:
    samples = list(probes.samples(LIMIT))
    keys = image_keys(samples)
    for sample, images in zip(samples, images_shown(samples, "wrong image", keys), strict=True):
        assert len(images) == 1
        assert images[0].name != sample.images[0].name


def about(id: str, *colours: str) -> TaskSample:
    """A sample about pictures of these colours; its images' names are its own."""
    images = tuple(BytesImage(f"{id}/{number}", colour.encode()) for number, colour in enumerate(colours))
    return TaskSample(id, images, "What?", ("red",))


def test_a_sample_with_more_images_than_all_others_is_shown_those_of_several() -> None:
    samples = [about("1", "red"), about("2", "blue"), about("5", "a", "b", "c", "d", "e"), about("0")]
    shown = images_shown(samples, "wrong image", image_keys(samples))
    names = [[one.name for one in images] for images in shown]
    assert names == [["2/0"], ["5/0"], ["1/0", "2/0", "1/0", "2/0", "1/0"], []]


def test_a_copy_of_the_picture_under_another_name_is_no_wrong_image() -> None:
    samples = [about("1", "red"), about("2", "red"), about("3", "blue")]
    assert [images[0].name for images in images_shown(samples, "wrong image", image_keys(samples))] == [
        "3/0",
        "3/0",
        "1/0",
    ]


class Counting:
    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.asked = 0

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        self.asked += len(questions)
        return [self.answer] * len(questions)


def test_a_control_that_cannot_be_asked_is_told_before_anything_is(tmp_path: Path) -> None:
    engine = Counting("red")
    with pytest.raises(DataError, match="no other picture can stand in for its own; take more samples"):
        answer_task(engine, open_task("short=x"), tmp_path / "a.jsonl", samples=[about("1", "red"), about("2", "red")])
    assert engine.asked == 0


def test_stored_answers_are_scored_by_the_rule_and_the_references_of_now(tmp_path: Path) -> None:
    task, engine, out = open_task("short=x"), Counting("red"), tmp_path / "a.jsonl"
    (first,) = answer_task(engine, task, out, conditions=["right image"], samples=[about("1", "pixels")])
    out.write_text(out.read_text().replace('"score": 1.0', '"score": 0.0').replace('"parsed": "red"', '"parsed": null'))
    (again,) = answer_task(engine, task, out, conditions=["right image"], samples=[about("1", "pixels")])
    assert (again, engine.asked) == (first, 1)
    other = replace(about("1", "pixels"), references=("blue",), category="colour")
    (found,) = answer_task(engine, task, out, conditions=["right image"], samples=[other])
    assert (found.score, found.references, found.category, engine.asked) == (0.0, ("blue",), "colour", 1)


def test_another_picture_under_the_same_name_is_asked_about_anew(tmp_path: Path) -> None:
    task, engine, out = open_task("short=x"), Counting("red"), tmp_path / "a.jsonl"
    for colour, asked in (("red", 1), ("red", 1), ("blue", 2)):
        answer_task(engine, task, out, conditions=["right image"], samples=[about("1", colour)])
        assert engine.asked == asked


def test_answers_to_other_prompts_are_refused(probes: Task, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    answer_task(Seer(probes), probes, out, conditions=["blind"], limit=3)
    out.write_text(out.read_text().replace('"prompt": "', '"prompt": "Please: '))
    with pytest.raises(DataError, match="another prompt"):
        answer_task(Seer(probes), probes, out, conditions=["blind"], limit=3)


def test_two_runs_are_compared_on_the_same_samples_only(probes: Task, tmp_path: Path) -> None:
    good = answer_task(Seer(probes), probes, tmp_path / "a.jsonl", conditions=["right image"], limit=LIMIT)
    half = answer_task(Seer(probes, knows=20), probes, tmp_path / "b.jsonl", conditions=["right image"], limit=LIMIT)
    result = compare_runs(probes, good, half)
    assert (result.first_better, result.second_better, result.samples) == (20, 0, LIMIT)
    assert result.difference.value == pytest.approx(0.5)
    assert result.test == "paired randomisation"  # several questions share a scene
    with pytest.raises(DataError, match="expected two runs on the same samples, found 1 in one alone"):
        compare_runs(probes, good[1:], half)
