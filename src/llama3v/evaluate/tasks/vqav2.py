"""VQAv2 (validation): questions about COCO photographs, ten annotators each.

Rule: as in lmms-eval 0.7.3 (tasks/vqav2/utils.py). The original evaluation leaves both sides as they are where all ten
annotators agree letter for letter; lmms-eval, and so this, normalises always.
"""

from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.answers import annotator_accuracy, normalise_vqa
from llama3v.evaluate.tasks.base import SHORT_PROMPT, Task, TaskSample
from llama3v.evaluate.tasks.rows import Row


class VqaV2(Task):
    name = "vqav2"
    rule = "VQA accuracy as in lmms-eval 0.7.3"
    hub = "lmms-lab/VQAv2"
    files = ("validation-*.parquet", "data/validation-*.parquet", "*.parquet", "*.json")

    def sample(self, row: Row) -> TaskSample:
        answers = row.value("answers")
        if not isinstance(answers, list) or not answers:
            raise DataError(
                f"{row.name}: has no answers; the test split is scored on the benchmark's server, use validation"
            )
        return TaskSample(
            id=row.text("question_id"),
            images=row.images("image"),
            prompt=f"{row.text('question')}\n{SHORT_PROMPT}",
            references=tuple(str(one["answer"]) if isinstance(one, dict) else str(one) for one in answers),
            category=str(row.get("answer_type", "?")),
            cluster=str(row.get("image_id")),
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        """Also "" of "A", which normalises to nothing: the annotators' "a" does, too."""
        return normalise_vqa(answer) if answer.strip() else None

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        return ""  # the rule compares it with the annotators' as any other

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        references = [normalise_vqa(reference) for reference in sample.references]
        return annotator_accuracy(parsed, references) if isinstance(parsed, str) else 0.0
