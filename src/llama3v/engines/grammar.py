"""Answers that obey a JSON schema: which tokens may come next is known before one is chosen, in every engine alike.

llguidance reads schema and tokenizer and keeps the state; what it does not know in a schema it refuses. No torch here.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.engines import grammar_check
from llama3v.errors import ConfigError, PromptError

LONGEST_SCHEMA = 2**16
"""Characters. OpenAI's own limit is about twice that; what is read here has to fit a stack."""
_PATIENCE = 60.0  # seconds; what bounds a check is its own CPU time, unless the machine is busy with other things
_VERDICTS, _COMPILED = 256, 16
_TELLING = ("Unimplemented keys", "Invalid type", "Unknown format", "Unsatisfiable schema", "schema too large")


class Grammar:
    """The state of one answer that obeys a schema."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits float [vocabulary] in which tokens that may not come next are -inf.

        Raises PromptError where the schema takes too much work at this place.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        may = np.zeros(len(logits), bool)
        may[: len(bits)] = bits[: len(logits)]
        if self._matcher.is_error() or not may.any():
            raise PromptError(
                "expected a JSON schema that the answer can follow, found one that is too complex at the place that it "
                "has reached; give a simpler schema"
            )
        return np.where(may, logits, -np.inf)

    def push(self, token: int) -> None:
        """The token that was chosen, one of those allowed."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes the grammars of an engine. Cheap until the first is asked for: then it reads the whole vocabulary.

    Args:
        tokenizer: has a `backend_tokenizer` of the package tokenizers.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # schema -> a matcher at its beginning; the latest last

    def start(self, schema: str) -> Grammar:
        """The beginning of an answer that obeys `schema`. Raises as `require_schema` does."""
        require_schema(schema)
        with self._lock:
            matcher = self._compiled.pop(schema, None) or self._compile(schema)
            self._compiled[schema] = matcher
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
            return Grammar(matcher.deep_copy())

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher

        return LLMatcher(self._vocabulary, grammar_check.grammar_of(schema), log_level=0, limits=grammar_check.limits())

    @functools.cached_property
    def _vocabulary(self) -> Any:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        return LLTokenizer(plain.to_str(), eos_token=list(self._stop_ids))


def is_installed() -> bool:
    """Whether answers can be made to obey a schema here. Cheap."""
    return importlib.util.find_spec("llguidance") is not None


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as the text that `Sampling.json_schema` takes."""
    return json.dumps({name: value for name, value in schema.items() if name != grammar_check.EXTENSION})


def require_schema(schema: str) -> None:
    """PromptError where no answer can be made to obey it (`fault_of`); ConfigError where the extra is missing."""
    if not is_installed():
        raise ConfigError("answers that obey a JSON schema need an extra: pip install 'llama3v[serve]'")
    fault = fault_of(schema)
    if fault:
        raise PromptError(f"expected a JSON schema that can be obeyed, but {fault}; give another schema")


def fault_of(schema: str) -> str:
    """Why no answer can be made to obey a schema, in words that a stranger may see; "" where one can. Bounded time.

    A schema that was not seen before takes a process of its own: a quarter of a second, at most two of CPU time.
    """
    if len(schema) > LONGEST_SCHEMA:
        return f"it has {len(schema):,} characters, and {LONGEST_SCHEMA:,} are the most"
    return _verdict(schema)


@functools.lru_cache(_VERDICTS)
def _verdict(schema: str) -> str:
    command = [sys.executable, "-P", str(Path(grammar_check.__file__))]  # -P: the modules beside it have others' names
    try:
        done = subprocess.run(command, input=schema.encode(), capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "it takes too long"
    if done.returncode != 0:
        return "it takes too much time or memory"
    reason = " ".join(done.stdout.decode("utf-8", "replace").split())
    if not reason or reason.startswith(_TELLING):
        return reason[:200]
    return "it is not valid, refers to something outside of it, or is too complex"
