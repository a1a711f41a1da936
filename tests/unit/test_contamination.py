"""Which pictures of a benchmark the training had: the same files by hash, changed ones by perceptual hash."""

import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

import llama3v
from llama3v.config import EvalConfig
from llama3v.errors import DataError
from llama3v.evaluate.contamination import clean_samples, read_trained
from llama3v.evaluate.specs import load, parse_specs
from llama3v.evaluate.tasks import open_task

SCENES = 6


def pictures() -> list[Image.Image]:
    images = dict.fromkeys(sample.images[0] for sample in open_task("probes").samples(6 * SCENES))
    return [Image.open(BytesIO(image.read())).convert("RGB") for image in images]


def write(folder: Path, names: dict[str, Image.Image], **options: int) -> str:
    folder.mkdir(exist_ok=True)
    rows = []
    for name, picture in names.items():
        picture.save(folder / name, **options)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a scene"}]
        rows.append({"id": name, "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return str(folder / "data.json")


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    """(training, benchmark): of the benchmark's six pictures the training has one as it is, and three changed."""
    drawn = pictures()
    benchmark = write(tmp_path / "benchmark", {f"{number}.png": picture for number, picture in enumerate(drawn)})
    changed = {
        "same.png": drawn[0],
        "again.jpg": drawn[1],
        "small.png": drawn[2].resize((drawn[2].width // 2, drawn[2].height // 2)),
        "bright.png": ImageEnhance.Brightness(drawn[3]).enhance(1.1),
    }
    return write(tmp_path / "training", changed), benchmark


def test_same_files_and_changed_copies_are_found_and_strangers_are_not(data: tuple[str, str]) -> None:
    training, benchmark = data
    one = load(parse_specs([f"short={benchmark}"], None)[0], None)
    matches = read_trained(None, [training]).matches(one.keys)
    found = {match.image: (match.trained, match.same_file) for match in matches}
    assert found == {
        "0.png": ("same.png", True),
        "1.png": ("again.jpg", False),
        "2.png": ("small.png", False),
        "3.png": ("bright.png", False),
    }
    assert clean_samples(matches, {"a": ["0.png"], "b": ["4.png"], "c": ["4.png", "1.png"]}) == {"b"}


def test_a_cache_finds_the_same_files_of_the_data_sets_that_are_named(
    data: tuple[str, str], tiny_vision_dir: Path, tmp_path: Path
) -> None:
    training, benchmark = data
    cache = tmp_path / "cache"
    for spec in data:  # both are in it, as when held-out pictures were encoded for validation
        llama3v.encode(llama3v.EncodeConfig(data=spec, vision=str(tiny_vision_dir), cache=cache))
    one = load(parse_specs([f"short={benchmark}"], None)[0], None)
    assert len(read_trained(cache, []).matches(one.keys)) == SCENES
    assert len(read_trained(cache, [training]).matches(one.keys)) == 4


class Same:
    def answer_batch(self, questions: object, *, max_new_tokens: int) -> list[str]:
        return ["a scene"] * len(questions)  # type: ignore[arg-type]


def test_eval_tells_it_and_what_is_scored_without(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, benchmark = data
    options = EvalConfig(model="named", tasks=(f"short={benchmark}",), out=tmp_path / "out", trained_data=(training,))
    known = llama3v.eval(options, Same())["tasks"][0]["contamination"]
    assert (known["images"], known["same_file"], known["near_duplicates"], known["clean_samples"]) == (6, 1, 3, 2)
    assert known["clean"]["value"] == 1.0
    assert "of 6 pictures the training had 1, and near-duplicates of 3; without them accuracy 1.000" in (
        " ".join(capsys.readouterr().out.split())
    )
    page = (tmp_path / "out" / "eval.html").read_text()
    assert "again.jpg" in page
    assert "pictures the training had" in page


def test_data_without_a_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="found none that can be read"):
        read_trained(None, [str(tmp_path / "empty.json")])
