"""What reaches the terminal, a pipe, and a person's eyes."""

import io
import os
import select
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from llama3v.engines.chat import _file_name
from llama3v.engines.terminal import is_file, show_picture, write
from llama3v.errors import ConfigError

pty = pytest.importorskip("pty", reason="needs a POSIX terminal")

DRAW = """
from PIL import Image
from llama3v.engines.terminal import show_picture
show_picture(Image.new("RGB", (3000, 3000), "red"))
"""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_codes_and_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "red \x1b[31mé\u200d\n\tgreen\x07"
    for stream, expected in [(Screen(), "red �[31mé\u200d\n\tgreen�"), (io.StringIO(), text)]:
        monkeypatch.setattr("sys.stdout", stream)
        write(text)
        assert stream.getvalue() == expected


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    write("café")
    assert stream.buffer.getvalue() == b"caf?"  # type: ignore[attr-defined]


def draw_on_a_terminal(columns: int, rows: int) -> str:
    """All that another process writes to a terminal of this size when it draws a picture."""
    import fcntl
    import struct
    import termios

    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover - another process
        environment = dict(os.environ, TERM="xterm-256color", COLORTERM="truecolor")
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", DRAW], environment)
    output = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux: the child is gone
                break
            if not part:
                break
            output += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, output.decode()
    return output.decode()


def test_a_picture_is_drawn_on_a_terminal() -> None:
    assert draw_on_a_terminal(80, 24).count("▀") > 500  # half cells: this terminal knows no graphics


def test_a_terminal_without_a_size_is_spared_the_picture() -> None:
    assert draw_on_a_terminal(0, 0) == ""


def test_a_picture_is_not_drawn_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show_picture(Image.new("RGB", (30, 30)))
    assert capsys.readouterr().out == ""


def test_file_names_are_taken_as_typed_and_as_terminals_paste_them(tmp_path: Path) -> None:
    plain, quote = tmp_path / "my photo.png", tmp_path / "it's.png"
    plain.touch()
    quote.touch()
    for typed in (str(plain), f"'{plain}'", f'"{plain}"', str(plain).replace(" ", "\\ ")):
        assert _file_name(typed) == str(plain)
    assert _file_name(str(quote)) == str(quote)
    assert _file_name("no such.png") == "no such.png"
    assert _file_name("~nobody-of-this-name/x.png") == "~nobody-of-this-name/x.png"
    for typed in ("", "-"):
        with pytest.raises(ConfigError, match="after /image"):
            _file_name(typed)


def test_text_that_cannot_be_a_file_name_is_no_file() -> None:
    assert not is_file("What is on the table? " * 200)
    assert not is_file("a\0b")
    assert is_file(__file__)
