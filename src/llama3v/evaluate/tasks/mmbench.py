"""MMBench (English, dev): option letters, each question asked once per rotation of its options.

Rule: the matching by letter, then by option text, that comes before any judge, as in lmms-eval 0.7.3
(tasks/mmbench/mmbench_evals.py: can_infer_option, can_infer_text). No judge reads what it leaves: that counts as wrong.
*Circular*: a question is right only if every rotation is; the rotations of question N have the indices N + k * 1,000,000. A
file without rotations gives the plain ("vanilla") accuracy alone. `records` hold each rotation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, Figure, Task, TaskSample, mean_score
from llama3v.evaluate.tasks.rows import Row

ROTATION = 1_000_000
_OPTIONS = "ABCDE"  # the letters that the rule looks for, whatever options there are
_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_FEW_WORDS = 3


def parse_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that stands alone in the answer, else with punctuation, else that of the one option whose text is there.

    `options`: letter -> text. Raises nothing.
    """
    words = answer.split()
    alone = [letter for letter in _OPTIONS if letter in words]
    # In a longer answer "A" may be the article, so that no letter is taken from it by itself.
    if len(alone) == 1 and not ("A" in words and len(words) > _FEW_WORDS):
        return alone[0]
    for form in _FORMS:
        found = [letter for letter in _OPTIONS if form.format(letter) in words]
        if len(found) == 1:
            return found[0]
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


class MmBench(Task):
    name = "mmbench"
    rule = "MMBench dev, letter and text matching as in lmms-eval 0.7.3, no judge"
    hub = "lmms-lab/MMBench"
    files = ("en/dev-*.parquet", "dev-*.parquet", "data/dev-*.parquet", "*DEV_EN*.tsv", "*.tsv", "*.parquet")

    def sample(self, row: Row) -> TaskSample:
        options = {letter: text for letter in "ABCD" if (text := _given(row, letter))}
        hint = _given(row, "hint")
        listed = "\n".join(["There are several options:", *(f"{letter}. {text}" for letter, text in options.items())])
        return TaskSample(
            id=row.text("index"),
            images=row.images("image"),
            prompt=f"{hint + ' ' if hint else ''}{row.text('question')} {listed}\n\n{LETTER_PROMPT}",
            references=(row.text("answer"),),
            category=str(row.get("category", "?")),
            choices=tuple(f"{letter} {text}" for letter, text in options.items()),
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_letter(answer, {choice[0]: choice[2:] for choice in sample.choices})

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)

    def figures(self) -> tuple[Figure, ...]:
        return (mean_score("accuracy (circular where rotated)"),)

    def settle(self, records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
        """One record a question: the first rotation's, with the lowest of their scores."""
        questions: dict[str, AnswerRecord] = {}
        for record in records:
            question = str(int(record.id) % ROTATION) if record.id.isdecimal() else record.id
            first = questions.setdefault(question, record)
            questions[question] = replace(first, score=min(first.score, record.score))
        return list(questions.values())

    def corpus_figures(self, records: Sequence[AnswerRecord]) -> dict[str, float]:
        rotations = sum(record.id.isdecimal() and int(record.id) >= ROTATION for record in records)
        vanilla = [record.score for record in records]
        return {"accuracy of single rotations": sum(vanilla) / len(vanilla), "rotations": float(rotations)}


def _given(row: Row, column: str) -> str:
    """The text of a cell; "" where there is none, which some copies write as "nan"."""
    text = str(row.get(column))
    return "" if text == "nan" else text
