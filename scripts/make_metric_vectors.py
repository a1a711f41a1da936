"""Record what lmms-eval 0.7.3 makes of tricky answers -> tests/golden/metric_vectors.json.

Run where lmms-eval is installed (it needs an environment of its own):
    pip install lmms-eval==0.7.3 && python scripts/make_metric_vectors.py
The answers are corner cases of each rule, and texts put together from the rule's own words by a fixed seed. What lmms-eval would
draw at random is recorded as null.
"""

import json
import random
from pathlib import Path
from unittest import mock

from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
from lmms_eval.tasks._task_utils import mmmu_mcq_utils
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from lmms_eval.tasks.seedbench.utils import seed_aggregation_result, seed_process_result
from lmms_eval.tasks.textvqa.utils import textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

OUT = Path(__file__).parent.parent / "tests" / "golden" / "metric_vectors.json"
CHOICES = ["a red fox", "Blue", "", "7"]
PIECES = [
    "A",
    "B",
    "C",
    "D",
    "E",
    "(A)",
    "(B)",
    "(C).",
    "B.",
    "D,",
    "C:",
    ":B)",
    "a red fox",
    "blue",
    "7",
    "the",
    "answer",
    "is",
]
PIECES += [
    "Answer: ",
    "so ",
    ".",
    ",",
    "'",
    "\n",
    " ",
    "I'd say",
    "=",
    "NASA",
    "b",
    "(d)",
    "Therefore",
    "a",
    "**B**",
    "B!",
    "final ",
]
NUMBERS = [
    "12",
    "12.0",
    "1,234",
    "1e3",
    "-3.456",
    "50%",
    "0.5",
    "nan",
    "inf",
    "-0",
    "0",
    ".5",
    "5.",
    "1_0",
    "12 %",
    "twelve",
    "12.6",
]
WORDS = [
    "dont",
    "two",
    "ten",
    "none",
    "The",
    "an",
    "it's",
    "its",
    "1,000",
    "st. louis",
    "3.5",
    "a/b",
    "x-ray",
    "o'clock",
    "?",
    "yes!",
    "(no)",
]
WORDS += [
    "couldn'tve",
    "U.S.A.",
    "\t",
    "\n",
    "green",
    "Green",
    "'s",
    "-",
    "somebody'd",
    "e.g.",
    "10",
    "café",
    "straße",
    "STRASSE",
    "İ",
]
ANSWERS = [
    "",
    " ",
    ".",
    "B",
    "b",
    " B ",
    "(B)",
    "B.",
    "B. Blue",
    "(b)",
    "Blue",
    "blue.",
    "ABC A ",
    "The answer is (C), not (A).",
    "E",
]
ANSWERS += [
    "Between A and D I take D",
    "I think that it must be a red fox",
    "it is 7, I think, not a red fox",
    "'B'",
    ",.B",
    "I see A cat there",
]


def texts(pieces: list[str], count: int, rng: random.Random) -> list[str]:
    return [rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(1, 7))) for _ in range(count)]


def mmmu_choice(answer: str) -> str | None:
    with mock.patch.object(mmmu_mcq_utils.random, "choice", return_value=None):
        parse, info = mmmu_mcq_utils.parse_mmmu_multi_choice_response, mmmu_mcq_utils.get_multi_choice_info
        index, letters = info(CHOICES)
        return parse(answer, letters, index)


def mmmu_open(answer: str, gold: str) -> list[object]:
    parsed = parse_open_response(answer)
    return [sorted(map(str, parsed)), bool(eval_open(gold, parsed))]


def ai2d(answer: str, letter: str) -> float:
    taken = MultiChoiceRegexFilter().apply([[answer.strip()]], [{}])  # as its model classes hand answers over
    return float(exact_match_hf_evaluate(taken, [letter], ignore_case=True, ignore_punctuation=True)["exact_match"])


def scienceqa(answer: str, number: int) -> float:
    return float(sqa_process_results({"choices": CHOICES, "answer": number}, [answer])["exact_match"])


def seedbench(answer: str, letter: str) -> float:
    doc = {"answer": letter, "data_type": "image", "question_id": 0}
    return float(seed_aggregation_result([seed_process_result(doc, [answer])["seed_all"]]))


def mmbench(answer: str) -> str | None:
    options = {"A": "a red fox", "B": "Blue", "C": "green tea", "D": "7"}
    return MMBench_Evaluator().can_infer(answer, options) or None


def mathvista(answer: str, kind: str, precision: int, choices: list[str]) -> str | None:
    """With quick_extract, and the answer itself where the rule would ask GPT."""
    problem = {
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": kind,
        "choices": choices,
        "query": "",
    }
    judge = MathVistaEvaluator()
    with mock.patch.object(judge, "get_chat_response", return_value=answer.strip()):
        taken = judge.extract_answer(answer.strip(), problem, quick_extract=True)
    return judge.normalize_extracted_answer(taken, choices, problem["question_type"], kind, precision)


def main() -> None:
    rng = random.Random(7)
    lettered = ANSWERS + texts(PIECES, 160, rng)
    worded = ["", *WORDS, *texts(WORDS, 120, rng)]
    annotators = [
        [rng.choice(worded) for _ in range(rng.choice([3, 10]))] + [answer] * rng.randint(0, 4) for answer in worded
    ]
    pairs = [(answer, gold) for answer in [*NUMBERS, "", "Blue"] for gold in [*NUMBERS, "blue"]]
    near = [(answer, [rng.choice(worded) for _ in range(3)] + [answer.upper()[1:] + "x"]) for answer in worded]
    numeric = [*NUMBERS, 'The answer is "12".', "It is 12", 'The answer is "2.345".', "", "1e400"]
    opened = [*lettered, *numeric, *texts(PIECES + NUMBERS, 80, rng)]
    evalai = EvalAIAnswerProcessor()
    vectors = {
        "source": "lmms-eval 0.7.3, by scripts/make_metric_vectors.py",
        "choices": CHOICES,
        "mmmu_choice": [[answer, mmmu_choice(answer)] for answer in lettered],
        "mmmu_open": [[answer, gold, *mmmu_open(answer, gold)] for answer in opened for gold in ("12", "blue", "B", "1,234.0")],
        "ai2d": [[answer, letter, ai2d(answer, letter)] for answer in lettered for letter in "BD"],
        "scienceqa": [[answer, "ABCD"[n], scienceqa(answer, n)] for answer in lettered for n in (1, 3)],
        "seedbench": [[answer, letter, seedbench(answer, letter)] for answer in lettered for letter in "BD"],
        "mmbench": [[answer, mmbench(answer)] for answer in lettered],
        "chartqa": [[answer, gold, float(relaxed_correctness(answer, gold))] for answer, gold in pairs],
        "docvqa": [[answer, golds, float(anls(golds, [answer])["anls"])] for answer, golds in near],
        "evalai": [[text, evalai(text)] for text in worded],
        "textvqa": [
            [answer, golds, textvqa_process_results({"answers": list(golds), "question_id": 0}, [answer])["exact_match"]]
            for answer, golds in zip(worded, annotators, strict=True)
        ],
        "vqav2": [
            [answer, golds, vqav2_process_results(
                {"answers": [{"answer": one, "answer_id": n} for n, one in enumerate(golds)], "question_id": 0}, [answer]
            )["exact_match"]]
            for answer, golds in zip(worded, annotators, strict=True)
        ],
        "mathvista_number": [
            [answer, kind, precision, mathvista(answer, kind, precision, [])]
            for answer in numeric for kind, precision in (("integer", 0), ("float", 1), ("float", 2))
        ],
        "mathvista_choice": [[answer, mathvista(answer, "text", 0, CHOICES)] for answer in lettered],
    }  # fmt: skip
    OUT.write_text(json.dumps(vectors, indent=None, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    print(f"{OUT}: {sum(len(rows) for rows in vectors.values() if isinstance(rows, list))} vectors")


if __name__ == "__main__":
    main()
