"""SEED-Bench, its image questions: nine kinds, four options.

Rule: the first character of the answer is the letter, as in lmms-eval 0.7.3 (tasks/seedbench/utils.py).
"""

from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, Task, TaskSample, as_letter, lettered
from llama3v.evaluate.tasks.rows import Row

KINDS = {
    "1": "scene understanding",
    "2": "instance identity",
    "3": "instance attributes",
    "4": "instance location",
    "5": "instance counting",
    "6": "spatial relation",
    "7": "instance interaction",
    "8": "visual reasoning",
    "9": "text understanding",
}
"""`question_type_id` in words (AILab-CVC/SEED-Bench, question_type)."""


def parse_letter(answer: str) -> str | None:
    """The answer's first character, where it is one of the letters A to D in either case."""
    return as_letter(answer.strip()[:1], 4)


class SeedBench(Task):
    name = "seedbench"
    rule = "SEED-Bench image questions: the answer's first character, as in lmms-eval 0.7.3"
    hub = "lmms-lab/SEED-Bench"
    files = ("test-*.parquet", "data/test-*.parquet", "*.parquet", "SEED-Bench*.json", "*.json")

    def sample(self, row: Row) -> TaskSample | None:
        if row.text("data_type") != "image":
            return None
        choices = tuple(row.text(f"choice_{letter}") for letter in "abcd")
        picture = row.text("data_id")
        return TaskSample(
            id=row.text("question_id"),
            images=row.images("image") if row.has_images("image") else row.in_folder("SEED-Bench-image", "data_id"),
            prompt=f"{row.text('question')}\n{lettered(choices)}\n{LETTER_PROMPT}",
            references=(row.text("answer").strip().upper(),),
            category=KINDS.get(row.text("question_type_id"), row.text("question_type_id")),
            choices=choices,
            cluster=picture,
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_letter(answer)

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)
