"""eval.html: what it holds, and that a claim is never mistaken for a measurement."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import llama3v
from llama3v.config import EvalConfig
from llama3v.engines.base import Question
from llama3v.evaluate.published import our_row, published
from llama3v.evaluate.table import notes
from llama3v.evaluate.tasks import TASKS, open_task
from llama3v.evaluate.tasks.pope import SETTINGS


class Yes:
    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        return ["Yes" if images else "<b>no</b>" for _, images in questions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE of four pictures in its three settings, and probes."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "val2014").mkdir()
    rows = []
    for number in range(8):
        name = f"{number // 2}.png"
        file = BytesIO()
        Image.new("RGB", (40, 30), (60 * (number // 2), 90, 120)).save(file, "PNG")
        (folder / "val2014" / name).write_bytes(file.getvalue())
        label = "yes" if number % 2 else "no"
        rows.append({"question": "Is there a cat?", "label": label, "image": name, "category": SETTINGS[number % 3]})
    (folder / "coco_pope_random.json").write_text("\n".join(json.dumps(row) for row in rows))
    tasks = (f"pope={folder}", "probes")
    llama3v.eval(EvalConfig(model="named", tasks=tasks, limit=8, out=folder / "out"), Yes())
    return folder / "out"


def test_the_report_has_scores_controls_claims_categories_and_answers_with_pictures(run: Path) -> None:
    page = (run / "eval.html").read_text()
    for part in (
        "Beside published claims",
        "none was measured here",
        "arXiv:2310.03744",
        "85.9",
        "35.3*",  # not checked against its source
        "named, measured here",
    ):
        assert part in page.replace("None was", "none was")
    for part in ("pope by category", "pope: answered right", "pope: answered wrong", "wrong image", "data:image/png"):
        assert part in page
    assert "<b>no</b>" not in page  # an answer cannot become markup
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is loaded from anywhere


@pytest.mark.parametrize(
    ("value", "p", "said"),
    [(0.1, 0.3, "no sight shown"), (-0.1, 0.01, "WORSE than with wrong images"), (0.1, 0.01, None)],
)
def test_a_score_that_is_not_better_than_with_wrong_images_is_told(value: float, p: float, said: str | None) -> None:
    against = {"p_value": p, "difference": {"value": value, "low": -1.0, "high": 1.0}}
    row = {"label": "pope", "figure": "accuracy", "differences": {"wrong image": against}}
    found = notes({"controls": True, "limit": None, "tasks": [row]})
    assert [said in one for one in found] == ([True] if said else [])


def test_our_row_is_the_published_figure_of_the_benchmark_in_per_cent(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    figures = summary["tasks"][0]["conditions"]["right image"]["figures"]
    each = [figures[f"F1, {setting}"]["value"] for setting in SETTINGS]
    assert our_row(summary) == {
        "pope": pytest.approx(100 * sum(each) / 3)
    }  # not the accuracy of 0.5, nor the F1 of all


def test_every_published_column_is_a_figure_of_a_task_and_every_claim_has_a_source() -> None:
    table = published()
    for one in table.benchmarks:
        assert one.task in TASKS
        task = open_task(f"{one.task}=somewhere")
        assert one.figure in [figure.name for figure in task.figures()]
        assert one.split in task.files[0]
    names = {one.task for one in table.benchmarks}
    for claim in table.claims:
        assert claim.source
        assert set(claim.scores) <= names
        assert set(claim.unchecked) <= set(claim.scores)
