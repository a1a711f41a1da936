"""DocVQA: questions about scanned pages.

Rule: average normalised Levenshtein similarity (ANLS, arXiv 1907.00490) as in lmms-eval 0.7.3 (api/metrics.py, from Qwen-VL).
Case and runs of spaces do not count in the distance; the length it is divided by is that of the texts as they stand.
"""

from collections.abc import Sequence

from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import SHORT_PROMPT, Figure, Task, TaskSample, mean_score
from llama3v.evaluate.tasks.distance import edit_distance
from llama3v.evaluate.tasks.rows import Row

THRESHOLD = 0.5
"""A similarity below it counts as none: the answer is another one, not a misread one."""


def anls(answer: str, references: Sequence[str]) -> float:
    """The similarity to the nearest reference, 0 to 1."""
    best = 1 - min(_distance(answer, reference) for reference in references)
    return best if best >= THRESHOLD else 0.0


def _distance(answer: str, reference: str) -> float:
    plain = [" ".join(text.strip().lower().split()) for text in (reference, answer)]
    length = max(len(reference.upper()), len(answer.upper()))  # upper: as the rule has it, though "ß" grows
    return edit_distance(*plain) / length if length else 0.0


class DocVqa(Task):
    name = "docvqa"
    rule = "ANLS (threshold 0.5) as in lmms-eval 0.7.3"
    hub = "lmms-lab/DocVQA"
    files = ("validation-*.parquet", "DocVQA/validation-*.parquet", "*.parquet", "val*.json", "*.json")
    max_new_tokens = 32

    def sample(self, row: Row) -> TaskSample:
        references = row.texts("answers")
        if not references:
            raise DataError(
                f"{row.name}: has no answers; the test split is scored on the benchmark's server, use validation"
            )
        kinds = row.values.get("question_types")
        return TaskSample(
            id=row.text("questionId"),
            images=row.images("image"),
            prompt=f"{row.text('question')}\n{SHORT_PROMPT}",
            references=references,
            category=str(kinds[0]) if kinds else "?",
            cluster=f"{row.get('ucsf_document_id')}/{row.get('ucsf_document_page_no')}".strip("/"),
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return answer.strip() or None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return anls(parsed, sample.references) if isinstance(parsed, str) else 0.0

    def figures(self) -> tuple[Figure, ...]:
        return (mean_score("ANLS"),)
