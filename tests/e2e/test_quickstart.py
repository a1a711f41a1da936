"""The quickstart from the first picture drawn to the last answer, in small."""

import json

import pytest

import llama3v
from llama3v.config import QuickstartConfig
from llama3v.engines.torch import TorchEngine
from llama3v.model.prompt import Turn

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    module = pytest.MonkeyPatch()
    for name, value in {"HELD_IN": 24, "HELD_OUT": 16, "STAGE_1_STEPS": STEPS, "STAGE_2_STEPS": STEPS}.items():
        module.setattr(f"llama3v.recipes.quickstart.{name}", value)
    out = tmp_path_factory.mktemp("quickstart")
    try:
        yield llama3v.quickstart(QuickstartConfig(out=out)), out
    finally:
        module.undo()


def test_the_summary_states_what_the_model_sees(run) -> None:
    summary, out = run
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("accuracy_right_image", "accuracy_wrong_image", "accuracy_blind"):
        assert 0 <= summary[name] <= 1
    assert summary["seconds"] > 0
    assert summary["questions"] >= len(summary["by_kind"]) >= 5


def test_stage_one_leaves_encoder_and_llm_as_they_were(run) -> None:
    from llama3v.model.llama3v import load_llm, load_model
    from llama3v.model.vision import load_tower
    from llama3v.recipes.quickstart import SCENE_LLM, SCENE_TOWER

    _, out = run
    stage_1, _ = load_model(out / "stage1")
    llm, _ = load_llm(str(SCENE_LLM))
    assert all((a == b).all() for a, b in zip(stage_1.llm.parameters(), llm.parameters(), strict=True))
    assert stage_1.vision.fingerprint() == load_tower(str(SCENE_TOWER)).fingerprint()


def test_what_it_leaves_is_a_model_that_answers(run) -> None:
    summary, out = run
    picture = out / "data" / "held-out" / "images" / "00001.png"
    answer = TorchEngine(out).answer(
        [Turn("user", "What is it?", images=(0,))], [picture.read_bytes()], max_new_tokens=4
    )
    assert isinstance(answer, str)
    assert summary["sft"]["steps"] == STEPS


def test_the_report_shows_pictures_with_answers(run) -> None:
    _, out = run
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") > 4
    assert "wrong image" in page
