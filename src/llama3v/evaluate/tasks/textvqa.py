"""TextVQA: questions about text in photographs.

Rule: EvalAI normalisation of both sides, then the mean over leave-one-out of min(1, matches / 3), as in lmms-eval 0.7.3
(tasks/textvqa/utils.py). The prompt has no OCR tokens.
"""

from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.answers import annotator_accuracy, normalise_evalai
from llama3v.evaluate.tasks.base import SHORT_PROMPT, Task, TaskSample
from llama3v.evaluate.tasks.rows import Row


class TextVqa(Task):
    name = "textvqa"
    rule = "VQA accuracy with EvalAI normalisation as in lmms-eval 0.7.3; no OCR tokens in the prompt"
    hub = "lmms-lab/textvqa"
    files = ("validation-*.parquet", "data/validation-*.parquet", "*.parquet", "*val*.json", "*.json")

    def sample(self, row: Row) -> TaskSample:
        references = row.texts("answers")
        if not any(references):
            raise DataError(
                f"{row.name}: has no answers; the test split is scored on the benchmark's server, use validation"
            )
        picture = str(row.get("image_id"))
        return TaskSample(
            id=row.text("question_id"),
            images=row.images("image")
            if row.has_images("image")
            else row.in_folder("train_images", "image_id", ".jpg"),
            prompt=f"{row.text('question').capitalize()}\n{SHORT_PROMPT}",
            references=references,
            cluster=picture,
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        """Also "" of "A", which normalises to nothing: the annotators' "a" does, too."""
        return normalise_evalai(answer) if answer.strip() else None

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        return ""  # the rule compares it with the annotators' as any other

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        references = [normalise_evalai(reference) for reference in sample.references]
        return annotator_accuracy(parsed, references) if isinstance(parsed, str) else 0.0
