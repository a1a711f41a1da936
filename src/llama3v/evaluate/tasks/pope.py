"""POPE: is there a ... in the image? Yes or no, about things that are there and things that are not.

Rule: the benchmark's own (AoiDragon/POPE, evaluate.py), which LLaVA's published figures follow: of the first sentence, any of
the words "No", "no", "not" means no, and *everything else means yes*. Here an answer with neither word nor a "yes" is counted
as unparsed, and scored as that yes. lmms-eval 0.7.3 wants the bare word instead ("yes", "no"; tasks/pope/utils.py), leaves
"Yes." out of precision and recall, and so inflates F1; `strict accuracy` is its accuracy, for comparison.

The F1 that LLaVA and others print is the mean of the three settings' (haotian-liu/LLaVA, llava/eval/eval_pope.py prints each;
github.com/haotian-liu/LLaVA/issues/626 has LLaVA-1.5-7B's: 87.2 random, 86.3 popular, 84.5 adversarial, mean 86.0, printed as
85.9). Theirs has 2,910 random questions, today's data set 3,000.
"""

import string
from functools import partial

import numpy as np

from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.statistics import Array, share
from llama3v.evaluate.tasks.base import SHORT_PROMPT, Figure, Task, TaskSample, mean_score
from llama3v.evaluate.tasks.rows import Row

SETTINGS = ("random", "popular", "adversarial")
MEAN_F1 = "F1, mean of the settings"
_MARKS = string.punctuation + string.whitespace


def parse_yes_no(answer: str) -> str | None:
    """ "yes", "no", or None where the first sentence says neither."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    if not {"No", "no", "not"}.isdisjoint(words):
        return "no"
    return "yes" if "yes" in (word.strip(_MARKS).lower() for word in words) else None


class Pope(Task):
    name = "pope"
    rule = "POPE's own evaluate.py: any no in the first sentence is no, everything else yes"
    hub = "lmms-lab/POPE"
    files = ("test-*.parquet", "data/test-*.parquet", "*.parquet", "coco_pope_*.json", "*.json", "*.jsonl")

    def sample(self, row: Row) -> TaskSample:
        own = "label" in row.values
        picture = str(row.get("image_source") or row.get("image"))
        return TaskSample(
            id=row.name if own else row.text("id", "question_id"),
            images=row.in_folder("val2014", "image") if own else row.images("image"),
            prompt=f"{row.text('question', 'text').strip()}\n{SHORT_PROMPT}",
            references=(row.text("answer", "label").lower().strip(),),
            category=str(row.get("category") or row.file.stem.removeprefix("coco_pope_")),
            cluster=picture,
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_yes_no(answer)

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        return "yes"

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)

    def figures(self) -> tuple[Figure, ...]:
        return (
            mean_score("accuracy"),
            Figure("F1", _counts, _f1),
            Figure("precision", _counts, lambda sums: share(sums[..., [0, 3]])),
            Figure("recall", _counts, lambda sums: share(sums[..., [0, 4]])),
            Figure("yes ratio", _counts, lambda sums: share(sums[..., [3, 5]])),
            Figure("strict accuracy", _strict),
            *(Figure(f"F1, {setting}", partial(_counts_of, setting), _f1) for setting in SETTINGS),
            Figure(MEAN_F1, _counts_by_setting, _mean_f1),
        )


def _counts(record: AnswerRecord) -> tuple[float, ...]:
    """Right yes, wrong yes, missed yes, said yes, gold yes, all."""
    gold = "yes" in record.references
    said = gold == (record.score == 1.0)
    return (gold and said, said and not gold, gold and not said, said, gold, 1.0)


def _counts_of(setting: str, record: AnswerRecord) -> tuple[float, ...]:
    counts = _counts(record)
    return counts if record.category == setting else (0.0,) * len(counts)


def _counts_by_setting(record: AnswerRecord) -> tuple[float, ...]:
    """The counts of one setting after the other."""
    return tuple(count for setting in SETTINGS for count in _counts_of(setting, record))


def _mean_f1(sums: Array) -> Array:
    """Not defined where a setting's is not."""
    return np.mean([_f1(part) for part in np.split(sums, len(SETTINGS), axis=-1)], axis=0)


def _strict(record: AnswerRecord) -> tuple[float, float]:
    return (float(record.answer.lower().strip() in record.references), 1.0)


def _f1(sums: Array) -> Array:
    """2 TP / (2 TP + FP + FN), which is the harmonic mean of precision and recall; not defined where all is "no", rightly."""
    twice = 2 * sums[..., 0]
    return share(np.stack([twice, twice + sums[..., 1] + sums[..., 2]], axis=-1))
