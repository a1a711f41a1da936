"""MMBench (English, dev): option letters, each question asked once per rotation of its options.

Rule: matching by letter, then by option text, as in lmms-eval 0.7.3 (tasks/mmbench/mmbench_evals.py: can_infer_option,
can_infer_text). What that leaves unmatched the published protocol gives to ChatGPT (arXiv 2307.06281): here to any
judge, in lmms-eval's words; without one it counts as wrong. So does a verdict that names no option, in whose place lmms-eval,
after three of them, draws one at random.
*Circular*: a question is right only if every rotation is; the rotations of question N have the indices N + k * 1,000,000. A
file without rotations gives the plain ("vanilla") accuracy alone. `records` hold each rotation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, Figure, TaskSample, mean_score
from llama3v.evaluate.tasks.judged import JudgedTask
from llama3v.evaluate.tasks.rows import Row

ROTATION = 1_000_000
_OPTIONS = "ABCDE"  # the letters that the rule looks for, whatever options there are
_FORMS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_FEW_WORDS = 3


def parse_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that stands alone in the answer, else with punctuation, else that of the one option whose text is there.

    `options`: letter -> text. Raises nothing.
    """
    words = answer.split()
    alone = [letter for letter in _OPTIONS if letter in words]
    # In a longer answer "A" may be the article, so that no letter is taken from it by itself.
    if len(alone) == 1 and not ("A" in words and len(words) > _FEW_WORDS):
        return alone[0]
    for form in _FORMS:
        found = [letter for letter in _OPTIONS if form.format(letter) in words]
        if len(found) == 1:
            return found[0]
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


# lmms-eval's text, word by word: with another one, scores would not compare.
MATCHING = (
    "You are an AI assistant who will help me to match an answer with several options of a single-choice question. "
    "You are provided with a question, several options, and an answer, and you need to find which option is most similar "
    "to the answer. If the meaning of all options are significantly different from the answer, output E. Your should "
    "output a single uppercase character in A, B, C, D (if they are valid options), and E. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: E\n"
    "Example 3: \nQuestion: {question}?\nOptions: There are several options: \n{options}\n\nAnswer: {answer}\nYour output: "
)


class MmBench(JudgedTask):
    name = "mmbench"
    rule = "MMBench dev, letter and text matching as in lmms-eval 0.7.3; other answers are read by a judge, if there is one, else wrong"
    needs_judge = False
    hub = "lmms-lab/MMBench"
    files = ("en/dev-*.parquet", "dev-*.parquet", "data/dev-*.parquet", "*DEV_EN*.tsv", "*.tsv", "*.parquet")

    def sample(self, row: Row) -> TaskSample:
        options = {letter: text for letter in "ABCD" if (text := _given(row, letter))}
        hint = _given(row, "hint")
        listed = "\n".join(["There are several options:", *(f"{letter}. {text}" for letter, text in options.items())])
        return TaskSample(
            id=row.text("index"),
            images=row.images("image"),
            prompt=f"{hint + ' ' if hint else ''}{row.text('question')} {listed}\n\n{LETTER_PROMPT}",
            references=(row.text("answer"),),
            category=str(row.get("category", "?")),
            choices=tuple(f"{letter} {text}" for letter, text in options.items()),
            details={"question": row.text("question")},
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return parse_letter(answer, _options(sample))

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        return float(parsed in sample.references)

    def awaits_judge(self, record: AnswerRecord) -> bool:
        return record.parsed is None

    def question_for_judge(self, sample: TaskSample, answer: str) -> str:
        listed = "\n".join(f"{letter}. {text}" for letter, text in _options(sample).items())
        return MATCHING.format(question=sample.details["question"], options=listed, answer=answer)

    def judged_record(self, record: AnswerRecord, sample: TaskSample, review: str) -> AnswerRecord:
        """A verdict is read as an answer is; "E" says that no option is meant."""
        letter = parse_letter(review, _options(sample))
        return replace(record, parsed=letter, score=0.0 if letter is None else self.score(letter, sample))

    def figures(self) -> tuple[Figure, ...]:
        return (mean_score("accuracy (circular where rotated)"),)

    def settle(self, records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
        """One record a question: the first rotation's, with the lowest of their scores."""
        questions: dict[str, AnswerRecord] = {}
        for record in records:
            question = str(int(record.id) % ROTATION) if record.id.isdecimal() else record.id
            first = questions.setdefault(question, record)
            questions[question] = replace(first, score=min(first.score, record.score))
        return list(questions.values())

    def corpus_figures(self, records: Sequence[AnswerRecord]) -> dict[str, float]:
        rotations = sum(record.id.isdecimal() and int(record.id) >= ROTATION for record in records)
        vanilla = [record.score for record in records]
        return {"accuracy of single rotations": sum(vanilla) / len(vanilla), "rotations": float(rotations)}


def _options(sample: TaskSample) -> dict[str, str]:
    """Letter -> text."""
    return {choice[0]: choice[2:] for choice in sample.choices}


def _given(row: Row, column: str) -> str:
    """The text of a cell; "" where there is none, which some copies write as "nan"."""
    text = str(row.get(column))
    return "" if text == "nan" else text
