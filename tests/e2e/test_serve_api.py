"""`llama3v serve` as its clients use it: the openai package, curl, and plain HTTP, against a tiny model."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.config import Sampling
from llama3v.engines.torch import TorchEngine
from llama3v.model.prompt import Turn
from llama3v.server.response_schema import (
    ChatChunk,
    ChatCompletion,
    Error,
    Health,
    ModelCard,
    ModelList,
    Ready,
    TextChunk,
    TextCompletion,
    Tokens,
)
from tests.serving import Running, data_url, image_part, png, running, text_part

QUESTION = "What is on the table?"
EXTENSIONS = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.7}


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu", conversations=2)


@pytest.fixture(scope="module")
def server(engine: TorchEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(engine: TorchEngine, text: str, *images: bytes, tokens: int = 24) -> str:
    return engine.answer([Turn("user", text, tuple(range(len(images))))], images, max_new_tokens=tokens)


def test_the_openai_client_gets_the_answer_that_the_engine_gives_alone(engine, server, client) -> None:
    data = png(1, (84, 42))
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [text_part(QUESTION), image_part(data)]}],
        max_completion_tokens=24,
    )
    assert answer.choices[0].message.content == alone(engine, QUESTION, data)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_whole_answer_in_pieces_and_ends_with_its_usage(engine, client) -> None:
    data = png(2)
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [image_part(data), text_part(QUESTION)]}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == alone(engine, QUESTION, data)
    assert len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 3
    assert chunks[-1].timings["tiles"] == 5  # 60 x 60 is four slices of 42, and the overview


def test_several_pictures_and_turns_keep_their_order(engine, client) -> None:
    first, second = png(3), png(4, (42, 42))
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image_part(first), text_part("What is it?")]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": [text_part("And here?"), image_part(second)]},
    ]
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "What is it?", (0,)),
        Turn("assistant", "A star."),
        Turn("user", "And here?", (1,)),
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16)
    assert answer.choices[0].message.content == engine.answer(turns, [first, second], max_new_tokens=16)


def test_low_detail_is_the_overview_alone(server: Running) -> None:
    data = png(5, (84, 84))
    sizes = {
        detail: server.chat([image_part(data, detail=detail)], max_tokens=1).json()["timings"]["tiles"]
        for detail in ("low", "high", "auto")
    }
    assert sizes == {"low": 1, "high": 5, "auto": 5}


def test_n_answers_differ_by_their_seeds_and_repeat_with_the_same_seed(client) -> None:
    def ask(seed: int) -> list[str]:
        messages = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, n=3, temperature=1.0, top_p=0.9, seed=seed, max_tokens=12
        )
        return [choice.message.content for choice in answer.choices]

    assert ask(7) == ask(7) != ask(8)
    assert len(set(ask(7))) == 3


def test_top_k_min_p_and_the_repetition_penalty_are_obeyed_as_on_the_command_line(engine, client) -> None:
    turns = [Turn("user", QUESTION)]

    def asked(**extra) -> str:
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=24,
            seed=5,
            temperature=extra.pop("temperature", 1.5),
            extra_body=extra,
        )
        return answer.choices[0].message.content

    found = {name: asked(**{name: value}) for name, value in EXTENSIONS.items()}
    for name, value in EXTENSIONS.items():
        sampling = Sampling(temperature=1.5, seed=5, **{name: value})
        assert found[name] == engine.answer(turns, max_new_tokens=24, sampling=sampling)
    assert len({asked(), *found.values()}) == 4
    assert asked(top_k=1) == asked(min_p=0.999) == asked(temperature=0, top_k=-1) == alone(engine, QUESTION)


@pytest.mark.parametrize(
    "field", [{"top_k": -2}, {"top_k": 1.5}, {"min_p": 1}, {"min_p": -0.1}, {"repetition_penalty": 0}]
)
def test_an_extension_out_of_its_range_is_refused_by_name(server: Running, field: dict) -> None:
    reply = server.chat("Hello", **field)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == next(iter(field))


def test_an_answer_ends_before_a_stop_text(engine, client) -> None:
    whole = alone(engine, QUESTION)
    stop = whole[6:9]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=24, stop=[stop]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_come_token_by_token(client) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=8, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens > 3
    assert content[0].bytes == list(answer.choices[0].message.content.encode())[: len(content[0].bytes)]
    for token in content:
        assert token.logprob <= 0
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy


def test_plain_completions_answer_each_prompt(engine, client) -> None:
    answer = client.completions.create(model="tiny", prompt=["Hello", QUESTION], max_tokens=12)
    assert [choice.text for choice in answer.choices] == [
        alone(engine, text, tokens=12) for text in ("Hello", QUESTION)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1]
    stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == alone(engine, "Hello", tokens=12)


def test_an_answer_obeys_the_schema_that_the_client_sends(client, server: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "things", "schema": schema, "strict": True}}
    content = [image_part(png(9)), text_part("What do you see?")]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "response_format": form}
    answer = client.chat.completions.create(**asked, n=3, temperature=1.0, seed=1)
    found = [json.loads(choice.message.content) for choice in answer.choices]
    assert all(set(thing) == {"colour", "count"} for thing in found)
    assert all(thing["colour"] in ("red", "blue") and 0 <= thing["count"] <= 9 for thing in found)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    free = server.chat("Hello", response_format={"type": "json_object"}, max_tokens=12).json()
    assert free["choices"][0]["message"]["content"].startswith("{")


def test_every_response_is_as_the_document_says(server: Running) -> None:
    kinds = {"/v1/models": ModelList, "/v1/models/tiny": ModelCard, "/health": Health, "/ready": Ready}
    for path, kind in kinds.items():
        kind.model_validate_json(server.http.get(path).content)
    messages = {"messages": [{"role": "user", "content": [image_part(png()), text_part(QUESTION)]}], "max_tokens": 4}
    asked = {
        "/v1/chat/completions": ({**messages, "logprobs": True, "top_logprobs": 2}, ChatCompletion, ChatChunk),
        "/v1/completions": ({"prompt": "Hello", "max_tokens": 4}, TextCompletion, TextChunk),
    }
    for path, (body, whole, chunk) in asked.items():
        whole.model_validate_json(server.http.post(path, json=body).content)
        stream = server.http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        assert [chunk.model_validate_json(line) for line in lines[:-1]][-1].usage is not None
    Tokens.model_validate_json(server.http.post("/tokenize", json={"prompt": "Hello"}).content)
    Error.model_validate_json(server.http.get("/nothing").content)


def test_what_the_document_gives_as_examples_is_answered(server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            assert server.http.post(path, json=example["value"]).status_code == 200
            tried += 1
    assert tried > 5


def test_fields_at_the_values_that_change_nothing_are_taken(server: Running) -> None:
    """Clients send their defaults."""
    plain = server.chat("Hello", max_tokens=4).json()["choices"]
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "modalities": ["text"]}
    assert server.chat("Hello", max_tokens=4, response_format={"type": "text"}, **neutral).json()["choices"] == plain


def test_the_openai_clients_errors_are_of_their_kinds(client) -> None:
    openai = pytest.importorskip("openai")
    hello = [{"role": "user", "content": "Hi"}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no such model"):
        create(model="gpt-4o", messages=hello)
    with pytest.raises(openai.BadRequestError, match="not valid base64"):
        create(model="tiny", messages=[{"role": "user", "content": [picture]}])
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        create(model="tiny", messages=hello, tools=[tool])


def test_curl_as_in_the_documents_works(server: Running, engine) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    data = png(6)
    content = [text_part(QUESTION), {"type": "image_url", "image_url": {"url": data_url(data)}}]
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 24})
    command = ["curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(
        [*command, f"{server.address}/v1/chat/completions"], input=body.encode(), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == alone(engine, QUESTION, data)


def test_tokenize_counts_what_the_prompt_will_have(server: Running) -> None:
    messages = [{"role": "user", "content": [image_part(png(7, (84, 84))), text_part(QUESTION)]}]
    counted = server.http.post("/tokenize", json={"messages": messages}).json()
    asked = server.chat(None, messages=messages, max_tokens=1).json()
    assert counted["count"] == len(counted["tokens"]) == asked["usage"]["prompt_tokens"]
    assert counted["max_model_len"] == 512
    plain = server.http.post("/tokenize", json={"prompt": "<|eot_id|>"}).json()
    assert plain["count"] > 1  # a special token in text is text


def test_a_picture_that_comes_again_costs_no_vision(server: Running) -> None:
    part = image_part(png(8, (84, 42)))
    first, second = (server.chat([part, text_part(text)], max_tokens=4) for text in ("One?", "Two?"))
    assert [answer.json()["timings"]["images_cached"] for answer in (first, second)] == [0, 1]
    assert second.json()["timings"]["vision_seconds"] < first.json()["timings"]["vision_seconds"]
    assert first.headers["x-llama3v-tiles"] == "3"
    assert float(first.headers["x-llama3v-vision-seconds"]) > 0


def test_health_readiness_and_metrics_are_there(server: Running) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"ready": True}
    server.chat("Hi", max_tokens=2)
    text = server.http.get("/metrics").text
    assert 'llama3v_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "llama3v_new_tokens_total" in text
    assert "llama3v_first_text_seconds_bucket" in text
