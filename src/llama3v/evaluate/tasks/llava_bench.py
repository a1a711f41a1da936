"""LLaVA-Bench (in the wild): open questions, answered at length, and judged by another model beside a reference answer.

Rule: LLaVA's own (haotian-liu/LLaVA, llava/eval/eval_gpt_review_bench.py, table/rule.json, summarize_gpt_review.py): the judge
reads a description of the picture, the question, GPT-4's answer as Assistant 1 and ours as Assistant 2, and gives both 1 to 10;
the score is the sum of ours over the sum of the other's. What LLaVA's script counts as -1 and -1, a verdict that cannot be
read, is unparsed here and left out of both sums. Scores compare only under the same judge, which is printed beside them.
"""

from collections.abc import Sequence
from dataclasses import replace

from llama3v.data.sources.base import ImageRef
from llama3v.errors import DataError
from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.tasks.base import Figure, TaskSample
from llama3v.evaluate.tasks.judged import JudgedTask
from llama3v.evaluate.tasks.rows import Row, read_rows

HIGHEST = 10.0
# The benchmark's text, word by word: with another one, scores would not compare.
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the image "
    "is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, accuracy, level of "
    "details of their responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score "
    "indicates better overall performance.\nPlease first output a single line containing only two values indicating the "
    "scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, please "
    "provide a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in "
    "which the responses were presented does not affect your judgment."
)


def parse_verdict(review: str) -> tuple[float, float] | None:
    """(the reference's score, ours) of the judge's first line; None where there are no two numbers from 0 to 10."""
    words = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if 0 <= first <= HIGHEST and 0 <= second <= HIGHEST else None


class LlavaBench(JudgedTask):
    name = "llavabench"
    needs_judge = True
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    rule = "LLaVA-Bench in the wild: a judge's points for the answer over its points for GPT-4's"
    hub = "lmms-lab/llava-bench-in-the-wild"
    files = ("*.parquet", "data/*.parquet", "questions.jsonl")
    max_new_tokens = 512

    def sample(self, row: Row) -> TaskSample:
        id = row.text("question_id")
        own = "question" not in row.values  # LLaVA's own files, not the hub's table
        context, reference = self._beside(row) if own else ("\n".join(row.texts("caption")), row.text("gpt_answer"))
        images: tuple[ImageRef, ...] = row.in_folder("images", "image") if own else row.images("image")
        return TaskSample(
            id=id,
            images=images,
            prompt=row.text("question", "text"),
            references=(reference,),
            category=str(row.get("category", "?")),
            cluster=str(row.get("image_id") or images[0].name),
            details={"context": context},
        )

    def _beside(self, row: Row) -> tuple[str, str]:
        """The context and GPT-4's answer, in context.jsonl and answers_gpt4.jsonl beside questions.jsonl."""
        folder = row.file.parent
        contexts = {one.text("image"): "\n".join(one.texts("caption")) for one in read_rows(folder / "context.jsonl")}
        answers = {one.text("question_id"): one.text("text") for one in read_rows(folder / "answers_gpt4.jsonl")}
        try:
            return contexts[row.text("image")], answers[row.text("question_id")]
        except KeyError as error:
            raise DataError(f"{row.name}: no context or answer of GPT-4 for {error} beside it") from error

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        """Before a judge has read it, an answer says only itself."""
        return answer.strip() or None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return 0.0

    def figures(self) -> tuple[Figure, ...]:
        return (Figure("points over GPT-4's", _points, most=HIGHEST),)

    def awaits_judge(self, record: AnswerRecord) -> bool:
        return True

    def question_for_judge(self, sample: TaskSample, answer: str) -> str:
        return (
            f"[Context]\n{sample.details['context']}\n\n[Question]\n{sample.prompt}\n\n"
            f"[Assistant 1]\n{sample.references[0]}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
        )

    def judged_record(self, record: AnswerRecord, sample: TaskSample, review: str) -> AnswerRecord:
        verdict = parse_verdict(review)
        return replace(record, parsed=verdict, score=0.0 if verdict is None else verdict[1] / HIGHEST)


def _points(record: AnswerRecord) -> Sequence[float]:
    """(ours, the reference's); nothing without a verdict."""
    if not isinstance(record.parsed, tuple):
        return (0.0, 0.0)
    reference, ours = map(float, record.parsed)
    return (ours, reference)
