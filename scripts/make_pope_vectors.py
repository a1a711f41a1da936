"""Record what POPE's own evaluate.py makes of tricky answers -> tests/golden/pope_vectors.json.

    python scripts/make_pope_vectors.py evaluate.py     # github.com/AoiDragon/POPE, recorded from commit f3ec604
Sets of answers are put together by a fixed seed; the script prints counts and figures of each.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).parent.parent / "tests" / "golden" / "pope_vectors.json"
ANSWERS = [
    "Yes", "yes", "Yes.", "Yes, there is a dog.", "No", "no", "No.", "No, there is none.", "NO", "nO", "There is not a dog.",
    "There is no dog", "There isn't.", "not", "Not", "none", "nothing", "Yes and no", "Yes. No.", "No. Yes.", "",  " ", ".",
    ".No", "no,", ",no", "no!", "(no)", "no\n", "\nno", "I do not know.", "A dog. Not a cat.", "Maybe", "know", "Norway",
    "no-one", "yes no", "unclear,no", "e.g. no", "NOT", "The answer is No", "**No**", "No;", "no\tdog",
]  # fmt: skip


def evaluate(script: str, answers: list[str], labels: list[str]) -> list[float]:
    """TP, FP, TN, FN, accuracy, precision, recall, F1, yes ratio, as the script prints them."""
    with tempfile.TemporaryDirectory() as folder:
        said, gold = Path(folder) / "answers.json", Path(folder) / "labels.json"
        said.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
        gold.write_text("".join(json.dumps({"label": label}) + "\n" for label in labels))
        code = script.replace("ans_file = ''", f"ans_file = {str(said)!r}")
        code = code.replace("label_file = ''", f"label_file = {str(gold)!r}")
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [float(number) for number in re.findall(r"(?<!F)\d[\d.e-]*", printed)]


def main() -> None:
    script = Path(sys.argv[1]).read_text()
    rng = random.Random(7)
    vectors = []
    # each answer alone, beside a right yes, which keeps the script from dividing by 0
    sets = [([answer, "Yes"], [label, "yes"]) for answer in ANSWERS for label in ("yes", "no")]
    for _ in range(12):
        answers = rng.choices(ANSWERS, k=rng.randint(5, 40))
        sets.append(([*answers, "Yes"], [*(rng.choice(["yes", "no"]) for _ in answers), "yes"]))
    for answers, labels in sets:
        vectors.append([answers, labels, evaluate(script, answers, labels)])
    source = "github.com/AoiDragon/POPE, evaluate.py at f3ec604, by scripts/make_pope_vectors.py"
    text = json.dumps({"source": source, "sets": vectors}, separators=(",", ":"))
    OUT.write_text(text.replace("],[[", "],\n[[") + "\n")
    print(f"{OUT}: {len(vectors)} sets")


if __name__ == "__main__":
    main()
