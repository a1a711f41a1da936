"""Whether an answer can be made to obey a JSON schema: a program for a process of its own.

A schema can be written that takes minutes to compile, or more stack than there is. Here that ends this process alone, with a
bound on time and memory. Reads the schema from its input and writes what is wrong with it, or nothing. It is run as a file,
so it imports nothing of this package; the grammar is made here for the engines, too, so that both compile the same.
"""

import os
import sys
import threading
from typing import Any

CPU_SECONDS = 2
_BYTES = 2**30
_STACK = 2**20  # of bytes; threads of the process that asks have at least this much
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes
EXTENSION = "x-guidance"
"""In a schema: options for the library, which are no client's business."""


def grammar_of(schema: str) -> str:
    """The library's grammar of a schema. Raises ValueError."""
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(schema, overrides=_FORM))


def limits() -> Any:
    """What one step may cost at most; more is an error of that answer."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _check(schema: str, found: list[str]) -> None:
    from llguidance import LLMatcher

    try:
        found.append(LLMatcher.validate_grammar(grammar_of(schema), limits=limits()))
    except ValueError as error:
        found.append(str(error))


def _bound() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; there the caller's patience is the only one
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Check one schema."""
    schema = sys.stdin.buffer.read().decode()
    import llguidance  # noqa: F401 - before the bounds: what it takes is no schema's fault

    if hasattr(os, "nice"):
        os.nice(10)  # answers go first
    _bound()
    found: list[str] = []
    threading.stack_size(_STACK)
    thread = threading.Thread(target=_check, args=(schema, found))
    thread.start()
    thread.join()
    sys.stdout.write(found[0] if found else "it cannot be compiled")


if __name__ == "__main__":
    main()
