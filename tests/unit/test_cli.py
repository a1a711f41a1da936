"""The command line: what it offers, what it imports, and how errors reach a person."""

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llama3v
from llama3v import cli, config
from llama3v.errors import ConfigError, ImageError, Llama3VError

GOLDEN = Path(__file__).parents[1] / "golden" / "cli_options.txt"
HEAVY = {"torch", "transformers", "numpy", "PIL", "matplotlib", "pyarrow", "jinja2"}


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def examples_of(options: type) -> list[str]:
    """The example lines of a docstring: indented text, below the line `Example:` or `Examples:`."""
    _, _, below = cli._describe(options, whole=True).partition("Example")
    return [line for line in below.splitlines() if line.startswith("    ")]


def frozen_options() -> str:
    """Every verb with its options, types and defaults, one a line."""
    lines = []
    for verb, options in cli.VERBS.items():
        for field in dataclasses.fields(options):
            name = field.name.replace("_", "-")
            default = "required" if field.default is dataclasses.MISSING else repr(_plain(field.default))
            lines.append(f"{verb} {name} = {default}")
    return "\n".join(lines) + "\n"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys, contextlib\n"
        "from llama3v import cli\n"
        "for arguments in [['--version'], ['--help'], *([verb, '--help'] for verb in cli.VERBS)]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main(arguments)\n"
        f"sys.exit(' '.join({HEAVY!r} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"help imported: {done.stderr}"


def test_a_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    assert "quickstart" in capsys.readouterr().out


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llama3v {llama3v.__version__}\n"


def test_every_options_dataclass_is_a_verb_and_every_verb_is_public() -> None:
    written_here = (value for value in vars(config).values() if dataclasses.is_dataclass(value))
    assert set(cli.VERBS.values()) == set(written_here) - {config.TrainConfig, config.Sampling, config.Running}
    for verb, options in cli.VERBS.items():
        assert verb in llama3v.__all__
        assert options.__name__ in llama3v.__all__


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verbs_help_shows_its_examples_and_options_unmangled(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys, verb)
    lines = shown.splitlines()
    examples = examples_of(cli.VERBS[verb])
    assert examples
    for example in examples:
        assert example in lines
    for field in dataclasses.fields(cli.VERBS[verb]):
        not_named = "Positional" in str(field.type) or "Suppress" in str(field.type)
        assert not_named or f"--{field.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verbs_examples_parse(verb: str) -> None:
    text = "\n".join(examples_of(cli.VERBS[verb])).replace("\\\n", " ")
    for command in text.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "llama3v"
        assert cli.parse(arguments)[0] == verb


def test_the_list_of_verbs_shows_one_line_about_each(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of(capsys).replace("│", " ").split())
    for options in cli.VERBS.values():
        assert cli._describe(options, whole=False) in shown
    assert "Example" not in shown


def test_the_set_of_verbs_and_options_is_frozen() -> None:
    """To change the command line on purpose, run with LLAMA3V_UPDATE_GOLDEN=1 and commit the golden file."""
    if os.environ.get("LLAMA3V_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(frozen_options())
    assert frozen_options() == GOLDEN.read_text(), (
        "the command line changed; if that is meant, run "
        "`LLAMA3V_UPDATE_GOLDEN=1 pytest tests/unit/test_cli.py` and name the change in CHANGELOG.md"
    )


def raising(error: BaseException) -> Callable[[object], None]:
    def verb(options: object) -> None:
        raise error

    return verb


@pytest.mark.parametrize("error", [Llama3VError("a\n  b"), ImageError("a b")])
def test_an_error_the_user_can_mend_is_one_line_and_exit_code_2(
    error: Llama3VError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vars(llama3v), "cache", raising(error))
    assert cli.main(["cache", "info", "somewhere"]) == 2
    assert capsys.readouterr().err == "llama3v: error: a b\n"


def test_a_file_name_cannot_send_escape_codes_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vars(llama3v), "cache", raising(ImageError("\x1b[2Jphoto.jpg: empty")))
    assert cli.main(["cache", "info", "somewhere"]) == 2
    assert capsys.readouterr().err == "llama3v: error: ?[2Jphoto.jpg: empty\n"


def test_options_that_cannot_work_together_are_told_like_every_other_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError):
        config.AskConfig(inputs=("a.png", "what?"), max_new_tokens=0)
    assert cli.main(["ask", "a.png", "what?", "--max-new-tokens", "0"]) == 2
    assert capsys.readouterr().err == "llama3v: error: --max-new-tokens is 0; give 1 or more\n"


@pytest.mark.parametrize("verb", ["ask", "caption"])
def test_a_verb_that_needs_images_says_so_when_there_are_none(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    assert capsys.readouterr().err.startswith("llama3v: error: give image files")


def test_an_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vars(llama3v), "cache", raising(KeyboardInterrupt()))
    assert cli.main(["cache", "info", "somewhere"]) == 130
    assert capsys.readouterr().err == "llama3v: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(llama3v), "cache", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["cache", "info", "somewhere"])


def test_a_reader_that_goes_away_is_met_in_silence() -> None:
    program = "from llama3v import cli; import sys; sys.exit(cli.main(['--help']))"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == cli.EXIT_BROKEN_PIPE
    child.stderr.close()


@pytest.mark.parametrize("arguments", [["encod"], ["encode", "--dat", "x"], ["cache", "look", "x"]])
def test_arguments_that_cannot_be_parsed_exit_with_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_transformers_keeps_quiet_but_downloads_show_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub.utils")
    logging = pytest.importorskip("transformers.utils.logging")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        cli._quiet_transformers()
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        assert not hub.are_progress_bars_disabled()
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@pytest.mark.parametrize(
    "verb", ["quickstart", "ask What", "caption x.png", "export", "compare a b", "encode --data d --vision v"]
)
@pytest.mark.parametrize("inside", ["", "/below"])
def test_an_out_that_cannot_be_a_directory_is_told_before_any_work(
    verb: str, inside: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(llama3v, verb.split()[0], lambda _: pytest.fail("the work began"))
    needed = ["--cache", str(tmp_path)] if verb.startswith("encode") else []
    assert cli.main([*verb.split(), *needed, "--out", f"{tmp_path}/file{inside}"]) == 2
    assert f"expected a directory, found the file {tmp_path}/file" in capsys.readouterr().err
