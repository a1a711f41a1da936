"""Every rule agrees with lmms-eval 0.7.3 on its corner cases (metric_vectors.json, by scripts/make_metric_vectors.py)."""

import json
from pathlib import Path

import pytest

from llama3v.evaluate.tasks import ai2d, mathvista, mmbench, mmmu, scienceqa, seedbench
from llama3v.evaluate.tasks.answers import annotator_accuracy, normalise_evalai, normalise_vqa
from llama3v.evaluate.tasks.chartqa import relaxed_equal
from llama3v.evaluate.tasks.docvqa import anls

VECTORS = json.loads((Path(__file__).parent / "metric_vectors.json").read_text())
CHOICES = VECTORS["choices"]


def test_mmmu_letters_are_read_as_by_lmms_eval() -> None:
    for answer, letter in VECTORS["mmmu_choice"]:
        assert mmmu.parse_choice(answer, CHOICES) == letter, answer


def test_mmmu_open_answers_are_read_and_matched_as_by_lmms_eval() -> None:
    for answer, gold, parsed, right in VECTORS["mmmu_open"]:
        ours = mmmu.parse_open(answer)
        assert sorted({str(value) for value in ours}) == sorted(set(parsed)), answer
        assert mmmu.matches_open(ours, [gold]) == right, (answer, gold)


@pytest.mark.parametrize(("name", "count"), [("ai2d", 4), ("scienceqa", 4), ("seedbench", 4)])
def test_option_letters_score_as_by_lmms_eval(name: str, count: int) -> None:
    parse = {
        "ai2d": lambda answer: ai2d.parse_letter(answer, count),
        "scienceqa": lambda answer: scienceqa.parse_letter(answer, count),
        "seedbench": seedbench.parse_letter,
    }[name]
    for answer, letter, score in VECTORS[name]:
        assert (parse(answer) == letter) == bool(score), (answer, letter)


def test_mmbench_letters_are_matched_as_by_lmms_eval_before_its_judge() -> None:
    options = {"A": "a red fox", "B": "Blue", "C": "green tea", "D": "7"}
    for answer, letter in VECTORS["mmbench"]:
        assert mmbench.parse_letter(answer, options) == letter, answer


def test_chartqa_relaxed_equality_is_that_of_lmms_eval() -> None:
    for answer, gold, score in VECTORS["chartqa"]:
        assert relaxed_equal(answer, gold) == bool(score), (answer, gold)


def test_docvqa_similarity_is_that_of_lmms_eval() -> None:
    for answer, golds, score in VECTORS["docvqa"]:
        assert anls(answer, golds) == pytest.approx(score, abs=1e-12), (answer, golds)


def test_vqa_normalisation_is_that_of_lmms_eval() -> None:
    for text, normalised in VECTORS["evalai"]:
        assert normalise_evalai(text) == normalised, text


@pytest.mark.parametrize(("name", "normalise"), [("textvqa", normalise_evalai), ("vqav2", normalise_vqa)])
def test_agreement_with_annotators_scores_as_by_lmms_eval(name: str, normalise) -> None:
    for answer, golds, score in VECTORS[name]:
        ours = annotator_accuracy(normalise(answer), [normalise(gold) for gold in golds])
        assert ours == pytest.approx(score, abs=1e-12), (answer, golds)


def test_mathvista_numbers_are_read_as_by_the_quick_extraction_of_lmms_eval() -> None:
    for answer, kind, precision, expected in VECTORS["mathvista_number"]:
        assert mathvista.read_number(mathvista.extract(answer, kind, ()), kind, precision) == expected, (answer, kind)


def test_mathvista_choices_are_read_or_guessed_as_by_lmms_eval_but_for_a_leading_letter() -> None:
    task = mathvista.MathVista("unread")
    sample = mathvista.TaskSample("1", (), "", ("7",), choices=tuple(CHOICES), details={"answer_type": "text"})
    for answer, expected in VECTORS["mathvista_choice"]:
        parsed = task.parse(answer, sample)
        if mathvista._LEADING.match(answer.strip()):  # ours: "B. ..." is B, where the rule goes by edit distance
            continue
        assert (task.guess(answer, sample) if parsed is None else parsed) == expected, answer
