"""Open answers, judged by another model behind an endpoint: every verdict is kept, so that a run that was stopped goes on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llama3v.config import EvalConfig
from llama3v.engines.api import ApiEngine
from llama3v.errors import ConfigError
from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.tasks.base import TaskSample
from llama3v.evaluate.tasks.llava_bench import SYSTEM, LlavaBench, question_for_judge
from llama3v.feature_cache import journal
from llama3v.model.prompt import Turn

KEY = "JUDGE_API_KEY"
LONGEST = 1024  # tokens of a verdict, as the benchmark has it
BATCH = 16


class Judge:
    """A model that reads answers. `name` is what is printed beside its scores."""

    def __init__(self, url: str, model: str) -> None:
        self.name = f"{model} at {url}"
        self._engine = ApiEngine(url, model, parallel=BATCH, key=os.environ.get(KEY))

    def read(self, questions: Sequence[str]) -> list[str]:
        """Its verdicts, word by word. Raises ConfigError, PromptError as `ApiEngine`."""
        turns = [[Turn("system", SYSTEM), Turn("user", question)] for question in questions]
        return self._engine.answer_batch([(one, []) for one in turns], max_new_tokens=LONGEST)


def open_judge(config: EvalConfig) -> Judge | None:
    """None where none is named."""
    if config.judge_url is None or config.judge_model is None:
        return None
    return Judge(config.judge_url, config.judge_model)


def need_judge(judge: Judge | None, label: str) -> Judge:
    """Raises ConfigError where a task needs a judge and there is none."""
    if judge is None:
        raise ConfigError(f"{label} is scored by a judge; give one: --judge-url URL --judge-model NAME")
    return judge


def judge_records(
    judge: Judge,
    task: LlavaBench,
    samples: Sequence[TaskSample],
    records: Sequence[AnswerRecord],
    out: Path,
    advance: Callable[[int], object] = lambda count: None,
) -> list[AnswerRecord]:
    """The records with their verdicts. `out` keeps {"judge", "condition", "id", "answer", "review"} lines: an answer that this
    judge has read is not read again.
    """
    by_id = {sample.id: sample for sample in samples}
    known = {_key(row): str(row["review"]) for row in journal.read(out)}
    found: list[AnswerRecord] = []
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        waiting = [record for record in some if _place(judge, record) not in known]
        reviews = judge.read([question_for_judge(by_id[record.id], record.answer) for record in waiting])
        for record, review in zip(waiting, reviews, strict=True):
            known[_place(judge, record)] = review
        journal.append(
            out,
            [
                {"judge": judge.name, "condition": one.condition, "id": one.id, "answer": one.answer, "review": review}
                for one, review in zip(waiting, reviews, strict=True)
            ],
        )
        found += [task.judged_record(record, known[_place(judge, record)]) for record in some]
        advance(len(some))
    return found


def _place(judge: Judge, record: AnswerRecord) -> tuple[str, str, str, str]:
    return (judge.name, record.condition, record.id, record.answer)


def _key(row: dict[str, str]) -> tuple[str, str, str, str]:
    return (row["judge"], row["condition"], row["id"], row["answer"])
