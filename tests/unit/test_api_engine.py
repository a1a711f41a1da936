"""The engine that asks an OpenAI-compatible endpoint, against one in a thread."""

import base64
from io import BytesIO

import pytest
from PIL import Image

from llama3v.engines.api import KEY, ApiEngine, data_url
from llama3v.engines.base import ImageFeatures
from llama3v.errors import ConfigError, PromptError
from llama3v.model.prompt import Turn
from llama3v.model.slicing import Grid
from tests.endpoint import endpoint

QUESTION = [Turn("user", "What is it?", (0,))]


def encoded(kind: str, exif: Image.Exif | None = None) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 2), "red").save(file, kind, **({"exif": exif} if exif else {}))
    return file.getvalue()


def test_the_endpoint_gets_turns_pictures_detail_and_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY, "secret")
    with endpoint(lambda asked: (200, "a red box")) as server:
        engine = ApiEngine(server.url, "peer", detail="low")
        assert engine.answer(QUESTION, [encoded("PNG")], max_new_tokens=7) == "a red box"
    asked = server.requests[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("peer", 7, 0.0)
    picture, text = asked["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert picture["image_url"]["detail"] == "low"
    assert base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,")) == encoded("PNG")
    assert server.keys == ["Bearer secret"]


def test_answers_come_in_the_order_of_the_questions() -> None:
    with endpoint(lambda asked: (200, asked["messages"][0]["content"][::-1])) as server:
        questions = [([Turn("user", f"question {number}")], []) for number in range(9)]
        answers = ApiEngine(server.url, "peer", parallel=4).answer_batch(questions, max_new_tokens=4)
    assert answers == [f"question {number}"[::-1] for number in range(9)]


def test_a_picture_that_programs_read_differently_is_sent_upright_as_png() -> None:
    lying = Image.Exif()
    lying[0x0112] = 6
    for data in (encoded("JPEG", lying), encoded("BMP")):
        address = data_url(data)
        assert address.startswith("data:image/png;base64,")
        sent = Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))
        assert sent.size == ((2, 4) if data[:2] != b"BM" else (4, 2))


def test_a_model_that_wants_the_newer_name_of_the_length_gets_it() -> None:
    def reply(asked: dict[str, object]) -> tuple[int, str]:
        return (200, "yes") if "max_completion_tokens" in asked else (400, "use max_completion_tokens instead")

    with endpoint(reply) as server:
        assert ApiEngine(server.url, "peer").answer([Turn("user", "?")], max_new_tokens=3) == "yes"


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [(400, PromptError, "too long"), (401, ConfigError, KEY), (404, ConfigError, "answers with an error")],
)
def test_a_refusal_is_told_in_one_line(status: int, kind: type[Exception], text: str) -> None:
    with endpoint(lambda asked: (status, "too long")) as server, pytest.raises(kind, match=text):
        ApiEngine(server.url, "peer").answer([Turn("user", "?")], max_new_tokens=3)


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama3v.engines.api.RETRIES", 0)
    with endpoint(lambda asked: (200, "")) as server:
        pass  # it has ended
    with pytest.raises(ConfigError, match="cannot be reached"):
        ApiEngine(server.url, "peer").answer([Turn("user", "?")], max_new_tokens=3)


def test_features_cannot_be_sent() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(PromptError, match="features"):
        data_url(ImageFeatures(torch.zeros(1, 9, 4), Grid(1, 1)))
