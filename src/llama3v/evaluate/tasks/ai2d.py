"""AI2D: diagrams of school science, by option letter.

Rule: lmms-eval 0.7.3, tasks/ai2d: a leading "B." is that letter, else the whole answer is compared with it; neither case nor
punctuation counts ("(b)" is B).
"""

import re
import string

from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, Task, TaskSample, as_letter, letter_of, lettered
from llama3v.evaluate.tasks.rows import Row

_LEADING = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse_letter(answer: str, count: int) -> str | None:
    """The letter, in upper case, of one of `count` options."""
    leading = _LEADING.match(answer)
    return as_letter(leading.group(1) if leading else answer.strip().translate(_NO_PUNCTUATION), count)


class Ai2d(Task):
    name = "ai2d"
    rule = "AI2D as in lmms-eval 0.7.3: leading letter, else the whole answer"
    hub = "lmms-lab/ai2d"
    files = ("test-*.parquet", "data/test-*.parquet", "*.parquet")

    def sample(self, row: Row) -> TaskSample:
        choices = row.texts("options")
        answer = row.text("answer")
        return TaskSample(
            id=row.name,
            images=row.images("image"),
            prompt=f"{row.text('question')}\n{lettered(choices)}\n{LETTER_PROMPT}",
            references=(letter_of(int(answer) if answer.isdecimal() else -1, choices, row),),
            choices=choices,
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_letter(answer, len(sample.choices))

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)
