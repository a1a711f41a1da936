"""POPE's figures are those of its own evaluate.py on tricky answers (pope_vectors.json, by scripts/make_pope_vectors.py), and
those that others printed of whole runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.tasks.base import TaskSample
from llama3v.evaluate.tasks.pope import MEAN_F1, Pope

VECTORS = json.loads((Path(__file__).parent / "pope_vectors.json").read_text())["sets"]
NAMES = ("accuracy", "precision", "recall", "F1", "yes ratio")
TASK = Pope("unread")

# What LLaVA's eval_pope.py printed of InternVL-Chat-V1-2-Plus (OpenGVLab/InternVL, README of its evaluation): TP, FP, TN, FN,
# accuracy, precision, recall, F1, yes ratio of each setting, "(89.5 + 88.7 + 87.6) / 3 = 88.6"
INTERNVL = {
    "random": (1230, 18, 1392, 270, 0.9010309278350516, 0.9855769230769231, 0.82, 0.8951965065502183, 0.4288659793814433),
    "popular": (1230, 42, 1458, 270, 0.896, 0.9669811320754716, 0.82, 0.8874458874458875, 0.424),
    "adversarial": (1230, 77, 1423, 270, 0.8843333333333333, 0.9410864575363428, 0.82, 0.8763804773779836, 0.43566666666666665),
}  # fmt: skip
# The F1 of LLaVA-1.5-7B (github.com/haotian-liu/LLaVA/issues/626), and counts that give them
LLAVA = {
    "random": (1183, 31, 1379, 317, 0.8717759764185703),
    "popular": (1183, 59, 1441, 317, 0.8628738147337709),
    "adversarial": (1183, 117, 1383, 317, 0.8450000000000001),
}


def figures(records: Sequence[AnswerRecord]) -> dict[str, float]:
    found = {one.name: one.value(np.sum([one.tallies(record) for record in records], axis=0)) for one in TASK.figures()}
    return {name: float(value) for name, value in found.items()}


def record(answer: str, gold: str, setting: str = "") -> AnswerRecord:
    grade = TASK.grade(answer, TaskSample("1", (), "", (gold,)))
    head = ("pope", "1", "right image", setting, "", (), "", answer)
    return AnswerRecord(*head, grade.parsed, (gold,), grade.score)


def counted(true_yes: int, false_yes: int, true_no: int, false_no: int, setting: str) -> list[AnswerRecord]:
    kinds = [("Yes", "yes", true_yes), ("Yes", "no", false_yes), ("No", "no", true_no), ("No", "yes", false_no)]
    return [one for said, gold, count in kinds for one in [record(said, gold, setting)] * count]


def test_tricky_answers_give_the_figures_of_popes_own_script() -> None:
    for answers, labels, (*_, accuracy, precision, recall, f1, yes_ratio) in VECTORS:
        found = figures([record(answer, label) for answer, label in zip(answers, labels, strict=True)])
        expected = (accuracy, precision, recall, f1, yes_ratio)
        assert [found[name] for name in NAMES] == pytest.approx(expected, abs=1e-12), answers


def test_counts_give_the_figures_that_were_printed_of_them() -> None:
    every = []
    for setting, (*counts, accuracy, precision, recall, f1, yes_ratio) in INTERNVL.items():
        records = counted(*counts, setting)
        found = figures(records)
        expected = (accuracy, precision, recall, f1, yes_ratio)
        assert [found[name] for name in NAMES] == pytest.approx(expected, abs=1e-12)
        assert found[f"F1, {setting}"] == pytest.approx(f1, abs=1e-12)
        every += records
    assert round(100 * figures(every)[MEAN_F1], 1) == 88.6


def test_the_mean_of_the_settings_f1_is_what_llava_printed() -> None:
    every = []
    for setting, (*counts, f1) in LLAVA.items():
        records = counted(*counts, setting)
        assert figures(records)["F1"] == pytest.approx(f1, abs=1e-12)
        every += records
    mean = 100 * figures(every)[MEAN_F1]
    assert mean == pytest.approx(85.9883263717447)
    assert int(10 * mean) / 10 == 85.9  # cut, not rounded, in the paper
