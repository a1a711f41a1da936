"""ChartQA: questions about charts, by people ("human") and by machine ("augmented").

Rule: relaxed accuracy, arXiv 2203.10244 section 5.1, as in lmms-eval 0.7.3 (tasks/chartqa/utils.py, from Qwen-VL): within 5 %
where both are numbers and the reference is not 0, else equal but for case. A "%" divides by 100.
"""

from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import Figure, Task, TaskSample, mean_score
from llama3v.evaluate.tasks.rows import Row

TOLERANCE = 0.05
_HUMAN = ("human", "human_test", "0")
_AUGMENTED = ("augmented", "augmented_test", "machine", "1")


def relaxed_equal(answer: str, reference: str) -> bool:
    number, gold = _number(answer), _number(reference)
    if number is None or not gold:
        return answer.lower() == reference.lower()
    return abs(number - gold) / abs(gold) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


class ChartQa(Task):
    name = "chartqa"
    rule = "ChartQA relaxed accuracy (5 %) as in lmms-eval 0.7.3"
    hub = "lmms-lab/ChartQA"
    files = ("test-*.parquet", "data/test-*.parquet", "*.parquet", "test_*.json", "test/test_*.json")

    def sample(self, row: Row) -> TaskSample:
        kind = str(row.get("type") or row.get("human_or_machine", None) or row.file.stem.removeprefix("test_"))
        if row.values.get("human_or_machine") == 0:
            kind = "human"
        name = "human" if kind in _HUMAN else "augmented" if kind in _AUGMENTED else kind
        # ChartQA's own JSON names the picture: png/<imgname> beside the file
        own = "imgname" in row.values
        images = row.in_folder("png", "imgname") if own else row.images("image")
        return TaskSample(
            id=row.name,
            images=images,
            prompt=f"{row.text('question', 'query')}\nAnswer the question with a single word.",
            references=row.texts("answer", "label")[:1],
            category=name,
            cluster=row.text("imgname") if own else "",
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return answer.strip() or None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(isinstance(parsed, str) and relaxed_equal(parsed, sample.references[0]))

    def figures(self) -> tuple[Figure, ...]:
        return (
            mean_score("relaxed accuracy"),
            mean_score("human", lambda record: record.category == "human"),
            mean_score("augmented", lambda record: record.category == "augmented"),
        )
