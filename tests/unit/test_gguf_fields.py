"""GGUF metadata read here against the package gguf, and files that end too early."""

from pathlib import Path

import numpy as np
import pytest

from llama3v.engines.gguf_fields import read_fields
from llama3v.errors import CheckpointError

gguf = pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "some.gguf", "clip")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.share", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_string("a.text", "vier Würfel")
    writer.add_array("some.texts", ["one", "two"])
    writer.add_array("some.numbers", [0.25, 0.75])
    writer.add_tensor("whole", np.ones((3, 5), np.float32))
    writer.add_tensor("half", np.ones((2, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "some.gguf"


def test_fields_are_those_that_the_package_reads(file: Path) -> None:
    expected = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    found = read_fields(file)
    assert found["a.text"] == "vier Würfel"
    assert found == {name: value for name, value in expected.items() if not name.startswith("GGUF.")}


def test_a_file_that_ends_too_early_is_told_wherever_it_was_cut(file: Path) -> None:
    data = file.read_bytes()
    last = len(data) - data[::-1].find(b"\x3c\x00"[::-1])  # after it only padding follows
    for end in range(4, last, 7):
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="cut short"):
            read_fields(file)


def test_absurd_lengths_take_no_memory(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[24:32] = b"\xff" * 8  # the length of the first name
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="ends too early"):
        read_fields(file)
