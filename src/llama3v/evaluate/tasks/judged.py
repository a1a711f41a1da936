"""Tasks whose published rule has a judge: a model that reads answers (evaluate/judge.py asks it)."""

from abc import abstractmethod
from typing import ClassVar

from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.tasks.base import Task, TaskSample


class JudgedTask(Task):
    """A subclass says which answers a judge reads, what it is asked, and what its verdict is worth."""

    needs_judge: ClassVar[bool]
    """Whether there is no score without one."""
    system: ClassVar[str] = ""
    """The judge's system prompt; "" for none."""

    @abstractmethod
    def awaits_judge(self, record: AnswerRecord) -> bool:
        """Whether a judge has to read the answer."""

    @abstractmethod
    def question_for_judge(self, sample: TaskSample, answer: str) -> str:
        """What it is asked about one answer."""

    @abstractmethod
    def judged_record(self, record: AnswerRecord, sample: TaskSample, review: str) -> AnswerRecord:
        """The record with the judge's verdict in the place of what was read out of the answer."""
