"""Every rule agrees with lmms-eval 0.7.3 on its corner cases (metric_vectors.json, by scripts/make_metric_vectors.py).

Scores go through `Task.grade`, as in a run: a rule that is right by itself can still be called wrongly.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama3v.evaluate.tasks import mathvista, mmmu, open_task
from llama3v.evaluate.tasks.answers import normalise_evalai
from llama3v.evaluate.tasks.base import Grade, TaskSample

VECTORS = json.loads((Path(__file__).parent / "metric_vectors.json").read_text())
CHOICES = tuple(VECTORS["choices"])


def grade(
    name: str,
    answer: str,
    references: Sequence[str],
    choices: tuple[str, ...] = (),
    details: dict[str, str] | None = None,
) -> Grade:
    sample = TaskSample("1", (), "", tuple(references), choices=choices, details=details or {})
    return open_task(f"{name}=unread").grade(answer, sample)


def test_mmmu_letters_are_read_as_by_lmms_eval() -> None:
    for answer, letter in VECTORS["mmmu_choice"]:
        found = grade("mmmu", answer, [letter or "none"], CHOICES)
        assert (found.parsed, found.score) == (letter, float(letter is not None)), answer


def test_mmmu_open_answers_are_read_and_matched_as_by_lmms_eval() -> None:
    for answer, gold, parsed, right in VECTORS["mmmu_open"]:
        ours = mmmu.parse_open(answer)
        assert sorted({str(value) for value in ours}) == sorted(set(parsed)), answer
        assert grade("mmmu", answer, [gold]).score == float(right), (answer, gold)


@pytest.mark.parametrize("name", ["ai2d", "scienceqa", "seedbench"])
def test_option_letters_score_as_by_lmms_eval(name: str) -> None:
    for answer, letter, score in VECTORS[name]:
        assert grade(name, answer, [letter], CHOICES).score == score, (answer, letter)


def test_mmbench_letters_are_matched_as_by_lmms_eval_before_its_judge() -> None:
    for answer, letter in VECTORS["mmbench"]:
        found = grade("mmbench", answer, [letter or "none"], ("A a red fox", "B Blue", "C green tea", "D 7"))
        assert (found.parsed, found.score) == (letter, float(letter is not None)), answer


@pytest.mark.parametrize("name", ["chartqa", "docvqa", "textvqa", "vqav2"])
def test_written_answers_score_as_by_lmms_eval(name: str) -> None:
    for answer, golds, score in VECTORS[name]:
        references = [golds] if isinstance(golds, str) else golds
        assert grade(name, answer, references).score == pytest.approx(score, abs=1e-12), (answer, golds)


@pytest.mark.parametrize("name", ["textvqa", "vqav2"])
def test_an_answer_that_normalises_to_nothing_is_an_answer(name: str) -> None:
    for answer in ("A", "a", "The"):
        assert grade(name, answer, ["a"] * 10) == Grade("", 1.0)
    assert grade(name, " ", ["cat"] * 10) == Grade(None, 0.0)
    assert grade("short", "A", ["a"]) == Grade("", 1.0)


def test_vqa_normalisation_is_that_of_lmms_eval() -> None:
    for text, normalised in VECTORS["evalai"]:
        assert normalise_evalai(text) == normalised, text


def test_mathvista_numbers_are_read_as_by_the_quick_extraction_of_lmms_eval() -> None:
    for answer, kind, precision, expected in VECTORS["mathvista_number"]:
        details = {"answer_type": kind, "precision": str(precision)}
        found = grade("mathvista", answer, [expected or "none"], details=details)
        assert (found.parsed, found.score) == (expected, float(expected is not None)), (answer, kind)


def test_mathvista_choices_are_read_or_guessed_as_by_lmms_eval_but_for_a_leading_letter() -> None:
    for answer, expected in VECTORS["mathvista_choice"]:
        if mathvista._LEADING.match(answer.strip()):  # ours: "B. ..." is B, where the rule goes by edit distance
            continue
        assert grade("mathvista", answer, [expected], CHOICES, {"answer_type": "text"}).score == 1.0, answer
