"""Answers that obey a JSON schema: whatever a model would say, and whoever wrote the schema."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs the extra llama3v[serve]")

from llama3v.config import Sampling
from llama3v.engines import grammar
from llama3v.engines.grammar import LONGEST_SCHEMA, fault_of, schema_text
from llama3v.engines.torch import TorchEngine
from llama3v.errors import PromptError
from llama3v.model.prompt import Turn

jsonschema = pytest.importorskip("jsonschema")
ASK = [Turn("user", "What is on the table?")]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "colour": {"enum": ["red", "green", None]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "an object": PERSON,
    "a list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "one of several": {"enum": ["cat", "dog", 7, None, {"a": [1]}]},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "a date": {"type": "string", "format": "date"},
    "a number in bounds": {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": "x"}, "maxItems": 2}]},
    "a reference": {
        "$defs": {"point": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 2}},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "a tree": {
        "type": "object",
        "properties": {"children": {"type": "array", "maxItems": 1, "items": {"$ref": "#"}}},
        "additionalProperties": False,
    },
    "every text there is": {"type": "string", "maxLength": 12},
}


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_random_models_answer_parses_and_obeys(engine: TorchEngine, name: str) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.5, "seed": 3, "top_k": 5, "min_p": 0.05},
    ]
    for way in ways:
        sampling = Sampling(json_schema=schema_text(SCHEMAS[name]), **way)
        generation = engine.generate(ASK, max_new_tokens=300, sampling=sampling)
        text = "".join(piece.text for piece in generation)
        assert generation.finish == "stop", text
        jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_any_object_is_an_object_or_the_beginning_of_one(engine: TorchEngine) -> None:
    for seed in range(6):
        sampling = Sampling(json_schema='{"type": "object"}', temperature=1.0, seed=seed)
        generation = engine.generate(ASK, max_new_tokens=100, sampling=sampling)
        text = "".join(piece.text for piece in generation)
        assert text.startswith("{")
        if generation.finish == "stop":
            assert isinstance(json.loads(text), dict)


def test_the_models_own_choice_is_kept_where_the_schema_allows_it(engine: TorchEngine) -> None:
    free = engine.answer(ASK, max_new_tokens=8)
    schema = schema_text({"enum": [free, "another answer"]})
    assert json.loads(engine.answer(ASK, max_new_tokens=100, sampling=Sampling(json_schema=schema))) in (
        free,
        "another answer",
    )
    assert engine.answer(ASK, max_new_tokens=8) == free  # and nothing of it stays


def deep(levels: int) -> str:
    return '{"type": "object", "properties": {"a": ' * levels + "{}" + "}}" * levels


def chain(length: int) -> dict[str, Any]:
    links: dict[str, Any] = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(length)}
    return {"$defs": {**links, str(length): {}}, "$ref": "#/$defs/0"}


HOSTILE: dict[str, dict[str, Any] | str] = {
    "of another place": {"$ref": "https://example.com/schema.json"},
    "of a file": {"$ref": "file:///etc/passwd"},
    "of nowhere": {"$ref": "#/$defs/absent"},
    "no schema": {"type": "banana"},
    "no type": {"type": 7},
    "a list": "[]",
    "no JSON": "{",
    "nothing obeys it": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "not known": {"type": "object", "unevaluatedProperties": {"not": {}}},
    "deep": deep(80),
    "deeper": deep(1200),
    "deepest": deep(100_000),
    "a long chain of references": chain(1400),  # as text it is short enough, but takes more stack than a thread has
    "a huge enum": {"enum": [f"value {number}" for number in range(50_000)]},
    "broken pattern": {"type": "string", "pattern": "((("},
    "deep pattern": {"type": "string", "pattern": "(" * 20_000 + ")" * 20_000},
    "patterns that take minutes": {
        "allOf": [{"type": "string", "pattern": f".*{number}.*[a-z]{{5}}.*{number + 1}"} for number in range(20)]
    },
    "alternatives that take minutes": {
        "allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}{j}"} for j in range(5)]} for i in range(7)]
    },
    "a lone surrogate": {"enum": ["\ud800"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_schema_is_refused_in_bounded_time(name: str) -> None:
    """In this process some of these take minutes, others end it."""
    schema = HOSTILE[name]
    started = time.process_time()
    fault = fault_of(schema if isinstance(schema, str) else schema_text(schema))
    assert fault
    assert len(fault) < 200
    assert "/" not in fault.replace("its/", "")  # nothing of this machine
    assert time.process_time() - started < 1  # what it cost was another process's


def test_a_schema_that_becomes_too_complex_ends_its_answer_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(1000)}}
    assert not fault_of(schema_text(many))
    with pytest.raises(PromptError, match="too complex"):
        engine.answer(ASK, max_new_tokens=50, sampling=Sampling(json_schema=schema_text(many)))
    assert engine.answer(ASK, max_new_tokens=4)


def test_an_engine_refuses_a_bad_schema_before_it_begins(engine: TorchEngine) -> None:
    with pytest.raises(PromptError, match="Invalid type: banana"):
        engine.generate(ASK, max_new_tokens=4, sampling=Sampling(json_schema='{"type": "banana"}'))
    with pytest.raises(PromptError, match=f"{LONGEST_SCHEMA:,} are the most"):
        engine.generate(ASK, max_new_tokens=4, sampling=Sampling(json_schema=" " * (LONGEST_SCHEMA + 1)))


def test_a_schema_that_was_seen_costs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = schema_text({"const": "seen"})
    assert fault_of(schema) == ""
    monkeypatch.setattr(grammar.subprocess, "run", lambda *_, **__: pytest.fail("another process"))
    assert fault_of(schema) == ""


def test_a_client_cannot_set_the_librarys_options() -> None:
    assert schema_text({"type": "object", "x-guidance": {"lenient": True}}) == '{"type": "object"}'
