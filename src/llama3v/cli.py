"""The command line: one verb, one options dataclass (config/), one function (``llama3v.<verb>``).

No logic of its own: it makes the parser from the dataclasses, calls the function, and turns an error that
the user can mend into one line and exit code 2. Nothing heavy is imported before the options are known.
"""

import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union, cast

import tyro

import llama3v
from llama3v import config, recipes
from llama3v.config.base import require_directory
from llama3v.errors import Llama3VError

VERBS: dict[str, type] = {
    "quickstart": config.QuickstartConfig,
    "encode": config.EncodeConfig,
    "cache": config.CacheConfig,
    "pretrain": config.PretrainConfig,
    "sft": config.SftConfig,
    "merge": config.MergeConfig,
    "ask": config.AskConfig,
    "chat": config.ChatConfig,
    "caption": config.CaptionConfig,
    "serve": config.ServeConfig,
    "export": config.ExportConfig,
    "doctor": config.DoctorConfig,
    "eval": config.EvalConfig,
    "compare": config.CompareConfig,
    "ablate": config.AblateConfig,
}

_DESCRIPTION = """Llama 3-V: give a language model eyes, cheaply, and run the result anywhere.

Start with `llama3v quickstart`. `llama3v VERB --help` shows a verb's examples and options,
`llama3v --version` the version."""

EXIT_USER_ERROR = 2  # the same code as tyro's for options it cannot parse
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code.

    0: done. 2: an error that the user can mend, told in one line on stderr (and, with --json, as {"error": ...} on
    stdout). 130: interrupted. 141: the reader
    of our output went away. Help, and options that cannot be parsed, raise SystemExit as argparse does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"llama3v {llama3v.__version__}")
        return 0
    try:
        try:
            verb, options = parse(arguments)
            _run(verb, options)
        finally:
            # Here and not at the interpreter's exit, where a closed pipe could no longer be handled.
            sys.stdout.flush()
    except Llama3VError as error:
        if "--json" in arguments:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": _one_line(error)}}), flush=True)
        print(f"llama3v: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        message = _one_line(stop)  # what was kept and how to go on, where the verb says it
        print(f"llama3v: interrupted{': ' if message else ''}{message}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return EXIT_BROKEN_PIPE
    return 0


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Turn arguments into (verb, its options); raises SystemExit for help and for what cannot be parsed."""
    verb = arguments[0] if arguments else None
    asked = recipes.asked_for(arguments)
    recipe = f"\n\nRecipe {asked}: {recipes.text_of(asked)}" if asked else ""
    commands = tuple(
        # A verb's own help shows its whole docstring, examples included; the list of verbs shows first lines.
        Annotated[options, tyro.conf.subcommand(name, description=_describe(options, whole=name == verb) + recipe)]
        for name, options in VERBS.items()
    )
    parsed = tyro.cli(
        cast(Any, Union[commands]),  # noqa: UP007 - made at run time, so `|` cannot write it
        prog="llama3v",
        description=_DESCRIPTION,
        args=recipes.expanded(arguments) or ["--help"],
    )
    return next(name for name, options in VERBS.items() if type(parsed) is options), parsed


def _run(verb: str, options: Any) -> None:
    if getattr(options, "out", None) is not None:  # a directory in every verb: told before any work is done
        require_directory(options.out, "out")
    if _may_load_transformers(verb, options):
        _quiet_transformers()
    getattr(llama3v, verb)(options)


def _may_load_transformers(verb: str, options: Any) -> bool:
    """Whether the verb may need it; its import alone takes seconds, and a GGUF pair runs without."""
    if verb in ("ask", "chat", "caption"):
        from llama3v.engines.llamacpp import is_gguf_pair

        return not is_gguf_pair(options.model)
    return verb != "cache"


def _describe(options: type, *, whole: bool) -> str:
    text = inspect.getdoc(options) or ""
    return text if whole else text.partition("\n")[0]


def _quiet_transformers() -> None:
    """Keep transformers' notes and its bar for loading weights off the terminal; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    downloads_are_shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # takes the hub's bars away too
    if downloads_are_shown:
        enable_progress_bars()


def _one_line(error: BaseException) -> str:
    """The message without line breaks, and without the escape codes that a file's name may carry."""
    words = " ".join(str(error).split())
    return "".join(character if character.isprintable() else "?" for character in words)


def _discard_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail again."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
