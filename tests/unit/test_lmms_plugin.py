"""The plug-in of lmms-eval, against a stand-in for it; examples/with_lmms_eval.py runs it under the real one."""

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from llama3v.engines.base import Question
from llama3v.errors import PromptError
from llama3v.model.prompt import Turn

ROOT = Path(__file__).parents[2]
RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


@dataclass
class Manifest:
    model_id: str
    chat_class_path: str


class Chat:
    """ChatMessages of lmms_eval/protocol.py, without its checks."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = [
            SimpleNamespace(role=one["role"], content=[SimpleNamespace(**part) for part in one["content"]])
            for one in messages
        ]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"__init__": lambda self: None})},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        "lmms_eval.protocol": {"ChatMessages": Chat},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llama3v.evaluate.lmms", raising=False)
    yield importlib.import_module("llama3v.evaluate.lmms")
    sys.modules.pop("llama3v.evaluate.lmms", None)


class Telling:
    """Says what it was asked; keeps the lengths."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def answer_batch(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        self.batches.append((len(questions), max_new_tokens))
        return [f"{turns[-1].text} {len(images)}\nmore" for turns, images in questions]


def request(number: int, **options: Any) -> SimpleNamespace:
    def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": RED}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    return SimpleNamespace(args=("", to_messages, options, number, "task", "test"))


def model_of(plugin: ModuleType, engine: Telling, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plugin, "open_engine", lambda model, quiet: engine)
    model = plugin.Llama3V(pretrained="runs/stage2", batch_size="2", device="cpu")
    model.task_dict = {"task": {"test": [{"question": f"question {number}"} for number in range(5)]}}
    return model


def test_the_entry_point_names_a_manifest_whose_class_is_of_the_chat_form(plugin: ModuleType) -> None:
    """lmms-eval swallows what goes wrong while it loads a plug-in, so it must be right."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["lmms_eval.models"]["llama3v"]
    module, _, function = target.partition(":")
    assert module == plugin.__name__
    manifest = getattr(plugin, function)()
    assert manifest.model_id == "llama3v"
    assert manifest.chat_class_path == f"{plugin.__name__}.Llama3V"
    assert plugin.Llama3V.is_simple is False


def test_answers_come_in_the_order_of_requests_in_batches_of_one_length_and_end_where_the_task_says(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Telling()
    model = model_of(plugin, engine, monkeypatch)
    lengths = (8, 4, 8, 8, 4)
    requests = [request(number, max_new_tokens=length, until=["\n"]) for number, length in enumerate(lengths)]
    assert model.generate_until(requests) == [f"question {number} 1" for number in range(5)]
    assert engine.batches == [(2, 8), (1, 8), (2, 4)]


def test_sampling_is_refused(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="temperature 0"):
        model_of(plugin, Telling(), monkeypatch).generate_until([request(0, temperature=0.7)])


def test_pictures_belong_to_their_turn_and_video_is_refused(plugin: ModuleType) -> None:
    def message(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
        return {"role": role, "content": list(parts)}

    red, blue = ({"type": "image", "url": picture} for picture in (RED, BLUE))
    said = {"type": "text", "text": "What?"}
    turns, images = plugin.question_of(
        Chat([message("user", red, said), message("assistant", said), message("user", blue, said)])
    )
    assert [turn.images for turn in turns] == [(0,), (), (1,)]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(PromptError, match="video"):
        plugin.question_of(Chat([message("user", {"type": "video", "url": "a.mp4"})]))


MMMU = [
    "Which, <image 2> or <image 1>?\nA. a fox\nB. a cow\n\nAnswer with the option's letter from the given choices directly.",
    "<image 1> How many?\n\nAnswer the question using a single word or phrase.",
    "See <image 1>. What does <image 1> say about <image 2>?\nA. 1\nB. 2",
]


@pytest.mark.parametrize("text", MMMU)
def test_mmmus_marks_stay_where_eval_has_them(plugin: ModuleType, text: str) -> None:
    """Messages as mmmu_doc_to_messages of lmms-eval 0.7.3 makes them: cut at the marks, the pieces stripped, some lost."""
    pictures = [RED, BLUE][: len(set(re.findall(r"<image \d>", text)))]
    pieces = [piece.strip() for piece in re.split(r"<image \d>", text)]
    content: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures):
        if pieces[number] and number < len(pieces) - 1:
            content.append({"type": "text", "text": pieces[number]})
        content.append({"type": "image", "url": picture})
    content.append({"type": "text", "text": pieces[-1]})
    turns, images = plugin.question_of(Chat([{"role": "user", "content": content}]), text)
    assert turns == [Turn("user", text, tuple(range(len(pictures))))]
    assert [image.getpixel((0, 0)) for image in images] == [picture.getpixel((0, 0)) for picture in pictures]


def test_a_picture_between_texts_is_marked_and_one_before_them_is_not(plugin: ModuleType) -> None:
    red, blue = ({"type": "image", "url": picture} for picture in (RED, BLUE))
    one, other = ({"type": "text", "text": text} for text in ("Is this", "like this?"))
    (turn,), _ = plugin.question_of(Chat([{"role": "user", "content": [red, one, blue, other]}]), "Is this like this?")
    assert (turn.text, turn.images) == ("Is this <image 2> like this?", (0, 1))
    (turn,), _ = plugin.question_of(Chat([{"role": "user", "content": [red, one, blue]}]), "Is this")
    assert turn.text == "Is this"
