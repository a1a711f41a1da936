"""Open answers, judged by another model behind an endpoint: every verdict is kept, so that a run that was stopped goes on."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from llama3v.config import EvalConfig
from llama3v.engines.api import ApiEngine
from llama3v.errors import ConfigError
from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.tasks.base import TaskSample
from llama3v.evaluate.tasks.judged import JudgedTask
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

    def read(self, questions: Sequence[str], system: str) -> list[str]:
        """Its verdicts, word by word. Raises ConfigError, PromptError as `ApiEngine`."""
        before = [Turn("system", system)] if system else []
        return self._engine.answer_batch(
            [([*before, Turn("user", question)], []) for question in questions], max_new_tokens=LONGEST
        )


def open_judge(config: EvalConfig) -> Judge | None:
    """None where none is named."""
    if config.judge_url is None or config.judge_model is None:
        return None
    return Judge(config.judge_url, config.judge_model)


def need_judge(judge: Judge | None, task: JudgedTask, label: str) -> None:
    """Raises ConfigError where a task has no score without a judge and there is none."""
    if judge is None and task.needs_judge:
        raise ConfigError(f"{label} is scored by a judge; give one: --judge-url URL --judge-model NAME")


def judge_records(
    judge: Judge,
    task: JudgedTask,
    samples: Sequence[TaskSample],
    records: Sequence[AnswerRecord],
    out: Path,
    advance: Callable[[int], object] = lambda count: None,
) -> list[AnswerRecord]:
    """The records, with verdicts where the task has a judge read them.

    `out` keeps {"judge", "asked", "condition", "id", "answer", "review"} lines: what this judge was asked already it is not
    asked again. "asked" is a hash of the question, so that other references or another context are another question.
    """
    by_id = {sample.id: sample for sample in samples}
    known = {(row["judge"], row.get("asked")): str(row["review"]) for row in journal.read(out)}
    found: list[AnswerRecord] = []
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        questions = {
            one.key: task.question_for_judge(by_id[one.id], one.answer) for one in some if task.awaits_judge(one)
        }
        places = {key: (judge.name, _hash(task.system + question)) for key, question in questions.items()}
        waiting = {places[one.key]: one for one in some if one.key in places and places[one.key] not in known}
        reviews = judge.read([questions[one.key] for one in waiting.values()], task.system)
        journal.append(
            out, [_line(place, one, review) for (place, one), review in zip(waiting.items(), reviews, strict=True)]
        )
        known |= dict(zip(waiting, reviews, strict=True))
        found += [
            task.judged_record(one, by_id[one.id], known[places[one.key]]) if one.key in places else one for one in some
        ]
        advance(len(some))
    return found


def _line(place: tuple[str, str], record: AnswerRecord, review: str) -> dict[str, str]:
    judge, asked = place
    who = {"judge": judge, "condition": record.condition, "id": record.id}
    return who | {"asked": asked, "answer": record.answer, "review": review}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
