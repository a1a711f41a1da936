"""MMMU: college questions, by option letter or open.

Rule: lmms-eval 0.7.3, tasks/_task_utils/mmmu_mcq_utils.py and tasks/mmmu/utils.py. It differs from MMMU's own
mmmu/utils/eval_utils.py in two places: a letter needs no space before it ("**B** " has one after it only), and "B." within a
sentence counts. Where nothing can be read, both choose an option at random; here the draw depends on the sample alone.
"""

import ast
import random
import re
from collections.abc import Sequence

from llama3v.errors import DataError
from llama3v.evaluate.records import Parsed
from llama3v.evaluate.tasks.base import LETTER_PROMPT, LETTERS, SHORT_PROMPT, Task, TaskSample, lettered
from llama3v.evaluate.tasks.rows import Row

_KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_ANSWERS = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12.5
)
_LONG_ANSWER = 5  # an option's text is looked for only in answers of more words


def parse_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that the answer names last, looked for as "(A)", then "A ", then "A.", then by its text."""
    text = answer
    for mark in ",.!?;:'":  # one after the other, as the rule does: ".B," keeps nothing but "B", ",.B" keeps ".B"
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(choices)]
    # Among several, the last counts; but the rule looks for " A " whether it found "A " or "A.".
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= _LONG_ANSWER:
        return None
    places = {letter: text.lower().rfind(choice.lower()) for letter, choice in zip(letters, choices, strict=False)}
    named = [letter for letter, place in places.items() if place >= 0]
    return max(named, key=lambda letter: places[letter]) if named else None


def parse_open(answer: str) -> tuple[str | float, ...]:
    """Everything an open answer may mean: the ends of its key sentences, and the numbers in them."""
    ends = _key_ends(answer)
    found = [*ends, *(number for end in ends for pattern in _NUMBERS for number in pattern.findall(end))]
    return tuple(dict.fromkeys(value for text in found for value in normalise(text)))


def matches_open(parsed: Sequence[str | float], references: Sequence[str]) -> bool:
    """A number must be among the references', a text must contain one of them."""
    golds = [value for reference in references for value in normalise(reference)]
    for value in parsed:
        if isinstance(value, str):
            if any(isinstance(gold, str) and gold in value for gold in golds):
                return True
        elif value in golds:
            return True
    return False


def normalise(text: str) -> list[str | float]:
    """A number to two places, or lower case; a lone letter gets a space on either side, against chance matches."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_ends(answer: str) -> list[str]:
    """What follows the last key phrase of each line, the shortest; the whole answer where there is none."""
    whole = answer.strip().strip(".").lower()
    # The rule also splits after ". " before a capital, but on text that it has put in lower case already.
    lines = whole.split("\n")
    ends = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for phrase in (*_KEY_PHRASES, "=") if number == len(lines) else _KEY_PHRASES:
            if phrase in line:
                end = line.split(phrase)[-1].strip()
                shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in _NO_ANSWERS:
            ends.append(shortest)
    return ends or [whole]


class Mmmu(Task):
    name = "mmmu"
    rule = "MMMU parsing as in lmms-eval 0.7.3; an unparsed letter is drawn at random, by the sample's id"
    hub = "lmms-lab/MMMU"
    files = ("validation-*.parquet", "data/validation-*.parquet", "*/validation-*.parquet", "*.parquet")
    max_new_tokens = 128

    def sample(self, row: Row) -> TaskSample:
        choices = _literal_list(row.text("options"), row)
        is_choice = row.text("question_type") == "multiple-choice"
        end = f"{lettered(choices)}\n\n{LETTER_PROMPT}" if is_choice else f"\n{SHORT_PROMPT}"
        prompt = f"{row.text('question')}\n{end}"
        # In the order of the rule: by name, each once, however often the text points at it.
        shown = sorted({f"image_{number}" for number in re.findall(r"<image (\d+)>", prompt)})
        answer = row.text("answer")
        id = row.text("id")
        return TaskSample(
            id=id,
            images=tuple(image for column in shown for image in row.images(column)),
            prompt=prompt,
            references=tuple(_literal_list(answer, row)) if answer.startswith("[") else (answer,),
            category=" ".join(id.split("_")[1:-1]) or "?",
            choices=tuple(choices) if is_choice else (),
        )

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        if sample.choices:
            return parse_choice(answer, sample.choices)
        return parse_open(answer) if answer.strip() else None

    def guess(self, answer: str, sample: TaskSample) -> Parsed | None:
        return random.Random(f"mmmu/{sample.id}").choice(LETTERS[: len(sample.choices)]) if sample.choices else None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        if isinstance(parsed, str):
            return float(parsed in sample.references)
        return float(matches_open(parsed, sample.references))


def _literal_list(text: str, row: Row) -> list[str]:
    """MMMU stores lists as Python text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{row.name}: expected a Python list, found {text[:60]!r}") from error
    if not isinstance(value, list):
        raise DataError(f"{row.name}: expected a Python list, found {text[:60]!r}")
    return [str(one) for one in value]
