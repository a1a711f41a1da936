"""MathVista with *quick extraction*: the short cuts of its rule, without the GPT model that reads the other answers.

Rule: lupantech/MathVista evaluation/extract_answer.py and calculate_score.py, which lmms-eval 0.7.3 follows
(tasks/mathvista/mathvista_evals.py). Scores are not comparable with published ones where those used a model: an answer that
says more than the answer is mostly lost here. One short cut is ours: a leading letter ("B.", "B)") counts as that option, as
any reader would have it. What the rule does with an unreadable choice, to take the option nearest by edit distance, is
scored as a guess.
"""

import re
from collections.abc import Sequence

from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, LETTERS, Task, TaskSample, lettered
from llama3v.evaluate.tasks.distance import edit_distance
from llama3v.evaluate.tasks.rows import Row

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_LEADING = re.compile(r"([A-Z])[.):]")
_FORMS = {
    "integer": "Answer the question using a single integer number.",
    "float1": "Answer the question using a single floating-point number with one decimal place.",
    "float2": "Answer the question using a single floating-point number with two decimal places.",
    "list": "Answer the question using a Python list.",
}


def extract(answer: str, answer_type: str, choices: Sequence[str]) -> str:
    """The part of the answer that answers, by the rule's short cuts; else the whole."""
    answer = answer.strip()
    if answer in choices:
        return answer
    try:
        if answer_type == "integer":
            return str(int(answer))
        if answer_type == "float":
            return str(float(answer))
    except ValueError:
        pass  # no bare number: the next short cut
    quoted = _QUOTED.search(answer)
    return quoted.group(1) if quoted else answer


def read_choice(extraction: str, choices: Sequence[str]) -> str | None:
    """The text of the option that the extraction names by letter or by text."""
    extraction = extraction.strip()
    bracketed, leading = _BRACKETED.search(extraction), _LEADING.match(extraction)
    if bracketed:
        extraction = bracketed.group(1).upper()
    elif leading and extraction not in choices:
        extraction = leading.group(1)
    if len(extraction) == 1 and extraction in LETTERS[: len(choices)]:
        return choices[LETTERS.index(extraction)]
    return extraction if extraction in choices else None


def read_number(extraction: str, answer_type: str, precision: int) -> str | None:
    """The number as the references are written."""
    try:
        value = float(extraction)
        return str(int(value)) if answer_type == "integer" else str(round(value, precision))
    except (ValueError, OverflowError):  # no number; infinity or nan as an integer
        return None


class MathVista(Task):
    name = "mathvista"
    rule = "MathVista, quick extraction (no GPT extraction: not comparable with scores that used one); a leading letter (B.) counts, which is ours"
    hub = "AI4Math/MathVista"
    files = ("testmini-*.parquet", "data/testmini-*.parquet", "*.parquet", "testmini.json", "*.json")
    max_new_tokens = 64

    def sample(self, row: Row) -> TaskSample:
        choices = row.texts("choices") if row.get("choices", None) else ()
        kind, places = row.text("answer_type"), int(row.get("precision", 0))
        if not choices and kind not in ("integer", "float", "list"):
            raise DataError(f"{row.name}: expected choices or an answer_type integer, float or list, found {kind!r}")
        unit = f" (Unit: {row.get('unit')})" if row.get("unit") else ""
        form = LETTER_PROMPT if choices else _FORMS.get(kind, _FORMS.get(f"{kind}{places}", ""))
        lines = [row.text("question") + unit, lettered(choices), form]
        metadata = row.get("metadata", {})
        return TaskSample(
            id=row.text("pid", "key"),
            images=row.images("decoded_image", "image"),
            prompt="\n".join(line for line in lines if line),
            references=(row.text("answer"),),
            category=str(metadata.get("task", "?")),
            choices=choices,
            cluster=str(row.get("image")),
            details={"answer_type": kind, "precision": str(places)},
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        kind = sample.details["answer_type"]
        extraction = extract(answer, kind, sample.choices)
        if sample.choices:
            return read_choice(extraction, sample.choices)
        if kind == "list":
            return extraction or None
        return read_number(extraction, kind, int(sample.details["precision"]))

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        if not sample.choices:
            return None
        extraction = extract(answer, sample.details["answer_type"], sample.choices)
        return min(sample.choices, key=lambda choice: edit_distance(extraction, choice))

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(isinstance(parsed, str) and parsed.strip() == sample.references[0].strip())
