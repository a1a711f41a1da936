"""ScienceQA-IMG: the test questions that have a picture.

Rule: LLaVA's, as in lmms-eval 0.7.3 (tasks/scienceqa/utils.py): the letter alone in either case, or a capital and a full stop
first ("B. because ...").
"""

from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, LETTERS, Task, TaskSample, as_letter, letter_of, lettered
from llama3v.evaluate.tasks.rows import Row


def parse_letter(answer: str, count: int) -> str | None:
    """The letter, in upper case, of one of `count` options."""
    text = answer.strip()
    if text[1:2] != ".":
        return as_letter(text, count)
    return text[0] if text[0] in LETTERS[:count] else None


class ScienceQa(Task):
    name = "scienceqa"
    rule = 'ScienceQA-IMG as in lmms-eval 0.7.3: the letter, or "X." first'
    hub = "lmms-lab/ScienceQA"
    files = ("ScienceQA-IMG/test-*.parquet", "test-*.parquet", "data/test-*.parquet", "*.parquet")

    def sample(self, row: Row) -> TaskSample | None:
        images = row.images("image")
        if not images:
            return None
        choices = row.texts("choices")
        answer = row.value("answer")
        hint = row.get("hint")
        context = f"Context: {hint}\n" if hint else ""
        return TaskSample(
            id=row.name,
            images=images,
            prompt=f"{context}{row.text('question')}\n{lettered(choices)}\n{LETTER_PROMPT}",
            references=(letter_of(answer if isinstance(answer, int) else -1, choices, row),),
            category=str(row.get("subject", "?")),
            choices=choices,
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_letter(answer, len(sample.choices))

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)
