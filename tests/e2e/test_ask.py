"""ask, chat and caption through the command line, with a random model: what is said, where, and with which exit code."""

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama3v.cli import main
from llama3v.config import AskConfig, CaptionConfig, ChatConfig
from llama3v.data.sources.base import Sample
from llama3v.data.sources.folder import FolderSource
from llama3v.engines.ask import ask
from llama3v.engines.captions import caption
from llama3v.engines.chat import chat
from llama3v.engines.torch import TorchEngine
from llama3v.errors import ConfigError, DataError, ImageError
from llama3v.model.prompt import Turn
from llama3v.model.tiles import make_tiles


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Three different pictures, the last one wide enough to be sliced."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = []
    for number, (size, color) in enumerate([((40, 30), "red"), ((42, 42), "blue"), ((84, 42), "green")]):
        names.append(str(folder / f"{number}.png"))
        Image.new("RGB", size, color).save(names[-1])
    return names


def bad_files(folder: Path) -> dict[str, str]:
    """Bad image file -> what its error says."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("This is no picture at all.")
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "huge.png").write_bytes(png + b"\0" * 64)
    return {
        str(folder / "empty.png"): "empty",
        str(folder / "text.png"): "text beginning",
        str(folder / "huge.png"): "50000x50000",
    }


def test_the_answer_is_all_of_stdout_and_what_the_engine_answers(
    engine: TorchEngine, pictures: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = AskConfig((pictures[0], "What is it?"), max_new_tokens=20, out=tmp_path / "out")
    summary = ask(config, engine)
    expected = engine.answer([Turn("user", "What is it?", (0,))], [Path(pictures[0]).read_bytes()], max_new_tokens=20)
    assert len(expected) > 10
    assert capsys.readouterr().out == expected + "\n"
    assert summary["answer"] == expected
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert [image["file"] for image in summary["images"]] == [pictures[0]]


def test_answers_depend_on_every_image_and_on_their_order(engine: TorchEngine, pictures: list[str]) -> None:
    a, b, c = pictures
    asked = [(a, b), (b, a), (a, c), (a,), ()]
    answers = [ask(AskConfig((*images, "What changed?"), max_new_tokens=20), engine)["answer"] for images in asked]
    assert len(set(answers)) == len(asked)


def test_sampling_repeats_with_its_seed_and_differs_with_another(engine: TorchEngine) -> None:
    def sample(seed: int) -> str:
        return ask(AskConfig(("Hello",), temperature=1.0, seed=seed, max_new_tokens=20), engine)["answer"]

    assert sample(1) == sample(1) != sample(2)


def test_an_image_comes_from_stdin(engine: TorchEngine, pictures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = ask(AskConfig((pictures[0], "What?"), max_new_tokens=8), engine)["answer"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(pictures[0]).read_bytes())))
    assert ask(AskConfig(("-", "What?"), max_new_tokens=8), engine)["answer"] == from_file


def test_caption_reads_one_image_from_stdin_beside_files(
    engine: TorchEngine, pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def captioned(*inputs: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(pictures[0]).read_bytes())))
        caption(CaptionConfig(inputs, max_new_tokens=8), engine)
        return capsys.readouterr().out

    assert captioned("-") == captioned(pictures[0]) != captioned(pictures[1])
    assert captioned("-", pictures[1]).splitlines()[0] == "-\t" + captioned(pictures[0]).strip()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no picture at all")))
    with pytest.raises(ImageError, match=r"^stdin: "):
        caption(CaptionConfig(("-",)), engine)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["caption", "-", "-"], "stdin holds one image"),
        (["caption", "-", "--sidecar"], "--sidecar needs files"),
        (["chat", "-"], "chat reads questions from stdin"),
    ],
)
def test_what_stdin_cannot_hold_is_one_line(arguments: list[str], reason: str, capsys) -> None:
    assert main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_the_command_writes_plain_text_to_a_pipe(tiny_model_dir: Path, pictures: list[str]) -> None:
    command = [sys.executable, "-m", "llama3v", "ask", pictures[2], "What is it?"]
    options = ["--model", str(tiny_model_dir), "--max-new-tokens", "12"]
    run = subprocess.run([*command, *options], capture_output=True, timeout=240, check=False)
    engine = TorchEngine(tiny_model_dir, device="cpu")
    picture = Path(pictures[2]).read_bytes()
    expected = engine.answer([Turn("user", "What is it?", (0,))], [picture], max_new_tokens=12)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode() == expected + "\n"


@pytest.mark.parametrize("verb", ["ask", "chat", "caption"])
def test_a_bad_file_is_one_line_and_exit_code_2_before_the_model_is_loaded(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {str(tmp_path / "missing.png"): "no such file"}
    for name, reason in (bad_files(tmp_path) | missing).items():
        arguments = [verb, name, *(["What is it?"] if verb == "ask" else []), "--model", str(tmp_path / "no model")]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert name in err
        assert reason in err


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (("{0}",), "expected a question"),
        (("{0}", "{1}"), "expected a question"),
        (("photo.jpg",), "expected a question"),
        (("{0}", "-"), "expected a question"),
        (("{0}", "  "), "empty"),
        (("-", "-", "What?"), "at most one"),
    ],
)
def test_what_is_no_question_about_images_is_refused(
    inputs: tuple[str, ...], message: str, pictures: list[str], engine: TorchEngine
) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(AskConfig(tuple(text.format(*pictures) for text in inputs)), engine)


def test_a_prompt_over_the_context_is_refused_and_never_cut(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "Why? " * 300, "--model", str(tiny_model_dir)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "at most 512 tokens" in err


def say(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_chat_goes_on_over_turns_with_the_images_so_far(
    engine: TorchEngine, pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(["What is it?", f"/image {pictures[1]}", "And this?", "", "Why?"], monkeypatch)
    turns = chat(ChatConfig((pictures[0],), max_new_tokens=10), engine)["turns"]
    assert [(turn["role"], turn["images"]) for turn in turns[::2]] == [("user", [0]), ("user", [1]), ("user", [])]
    images = [Path(name).read_bytes() for name in pictures[:2]]
    history: list[Turn] = []
    for number, (question, owned) in enumerate([("What is it?", (0,)), ("And this?", (1,)), ("Why?", ())]):
        history.append(Turn("user", question, owned))
        expected = engine.answer(history, images[: number + 1], max_new_tokens=10)
        assert turns[2 * number + 1]["text"] == expected
        history.append(Turn("assistant", expected))
    answers = [turn["text"] for turn in turns[1::2]]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_chat_encodes_a_picture_once(
    tiny_model_dir: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(tiny_model_dir, device="cpu")
    encoded = []
    trunk = engine.model.vision.trunk
    monkeypatch.setattr(engine.model.vision, "trunk", lambda pixels: encoded.append(len(pixels)) or trunk(pixels))
    say(
        ["What is it?", "Why?", f"/image {pictures[2]}", "And?", "/reset", f"/image {pictures[0]}", "What?"],
        monkeypatch,
    )
    chat(ChatConfig((pictures[0],), max_new_tokens=4), engine)
    assert encoded == [1, 3]  # a picture of one tile, and one of an overview and two slices


def test_chat_tells_what_is_wrong_and_goes_on(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = bad_files(tmp_path)
    lines = [f"/image {name}" for name in bad] + ["/image", "/dance", "x " * 600, "Hello", "/quit", "never asked"]
    say(lines, monkeypatch)
    turns = chat(ChatConfig(max_new_tokens=4), engine)["turns"]
    assert [turn["text"] for turn in turns if turn["role"] == "user"] == ["Hello"]
    err = capsys.readouterr().err
    for reason in [*bad.values(), "expected a file after /image", "/dance", "at most 512 tokens"]:
        assert reason.replace(" ", "") in err.replace("\n", "").replace(" ", "")  # the console wraps lines


def test_captions_of_a_folder_leave_bad_images_out_and_say_so(
    engine: TorchEngine, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(pictures[0]).parent
    bad = bad_files(folder)
    summary = caption(CaptionConfig((str(folder),), out=tmp_path / "out", max_new_tokens=8), engine)
    assert (summary["images"], summary["captioned"], summary["left_out"]) == (6, 3, 3)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0.png", "1.png", "2.png"]
    out, err = capsys.readouterr()
    assert out == "".join(f"{row['file_name']}\t{row['text']}\n" for row in rows)
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert {row["id"] for row in ledger} == {Path(name).name for name in bad}
    assert "3 of 6 images left out" in err


def test_captions_that_exist_are_kept_for_the_same_image_and_prompt(
    engine: TorchEngine, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*names: str, prompt: str = "Describe the image.", model: str = "a model") -> dict[str, int]:
        config = CaptionConfig(names, model, prompt, tmp_path / "out", 8)
        summary = caption(config, engine)
        return {count: summary[count] for count in ("captioned", "kept")}

    listing = tmp_path / "out" / "captions.jsonl"
    assert run(*pictures[:2]) == {"captioned": 2, "kept": 0}
    first = listing.read_bytes()
    assert run(*pictures[:2]) == {"captioned": 0, "kept": 2}
    assert listing.read_bytes() == first
    copy = tmp_path / "copy.png"  # the same image by another name
    copy.write_bytes(Path(pictures[0]).read_bytes())
    assert run(*pictures, str(copy)) == {"captioned": 1, "kept": 3}
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [row["text"] for row in rows if row["file_name"] in (pictures[0], str(copy))] == [rows[0]["text"]] * 2
    assert run(pictures[0], prompt="What is it?") == {"captioned": 1, "kept": 0}
    assert run(pictures[0]) == {"captioned": 0, "kept": 1}
    with pytest.raises(ConfigError, match="holds captions by a model"):
        run(pictures[0], model="another model")
    capsys.readouterr()


def test_a_caption_that_a_kill_cut_short_is_made_again(
    engine: TorchEngine, pictures: list[str], tmp_path: Path
) -> None:
    config = CaptionConfig(tuple(pictures), "a model", out=tmp_path, max_new_tokens=8)
    caption(config, engine)
    listing = tmp_path / "captions.jsonl"
    whole = listing.read_bytes()
    for cut in (1, 10, len(whole) - whole.index(b"\n") - 2):
        listing.write_bytes(whole[:-cut])
        caption(config, engine)
        texts = [[json.loads(line)["text"] for line in data.splitlines()] for data in (listing.read_bytes(), whole)]
        assert texts[0] == texts[1]


def test_a_single_image_prints_its_caption_alone(
    tiny_model_dir: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", pictures[0], "--model", str(tiny_model_dir), "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "\t" not in out.strip()
    assert err == ""


def test_a_folder_without_images_or_with_bad_ones_only_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(tmp_path)]) == 2
    assert "found none" in capsys.readouterr().err
    bad_files(tmp_path)
    assert main(["caption", str(tmp_path)]) == 2
    assert "none of the 3 images" in capsys.readouterr().err


def test_low_detail_shows_the_model_the_overview_alone(
    engine: TorchEngine, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    cut = engine._visual_tokens_of_tiles
    monkeypatch.setattr(engine, "_visual_tokens_of_tiles", lambda tiles: seen.append(tiles) or cut(tiles))
    wide = pictures[2]
    ask(AskConfig((wide, "What?"), detail="low", max_new_tokens=4), engine)
    say([f"/image {wide}", "What?"], monkeypatch)
    chat(ChatConfig(detail="low", max_new_tokens=4), engine)
    caption(CaptionConfig((wide,), detail="low", max_new_tokens=4), engine)
    whole = make_tiles(Image.open(wide), engine.tile_size, 4)
    assert [tiles.grid.tiles for tiles in seen] == [1]  # all three made the same picture of it
    assert whole.grid.tiles == 3
    assert np.array_equal(seen[0].pixels[0], whole.pixels[0])


def test_json_is_one_object_on_stdout_with_answer_and_timings(
    engine: TorchEngine, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = ask(AskConfig((pictures[0], "What is it?"), json=True, max_new_tokens=8), engine)
    out = capsys.readouterr().out
    assert json.loads(out) == summary
    assert out.count("\n") == 1
    assert {"answer", "seconds_to_load", "seconds_to_first_text", "seconds"} <= summary.keys()

    caption(CaptionConfig(tuple(pictures), json=True, max_new_tokens=4), engine)
    captions = json.loads(capsys.readouterr().out)["captions"]
    assert [row["file_name"] for row in captions] == pictures
    assert all(row["text"] for row in captions)


def test_json_tells_an_error_on_stdout_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ask", str(tmp_path / "no.png"), "What?"], ["ask", "What?", "--max-new-tokens", "0"]):
        assert main([*arguments, "--json"]) == 2
        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert error["message"] in err
        assert error["kind"] in ("ImageError", "ConfigError")


def test_sidecars_are_captions_that_data_sources_read_and_that_are_never_replaced(
    engine: TorchEngine, pictures: list[str], tmp_path: Path
) -> None:
    folder = Path(pictures[0]).parent
    (folder / "1.txt").write_text("My own words.\n")
    config = CaptionConfig((str(folder),), sidecar=True, max_new_tokens=8, out=tmp_path / "out", format="csv")
    first = caption(config, engine)
    assert (first["captioned"], first["kept"]) == (2, 1)
    assert (folder / "1.txt").read_text() == "My own words.\n"
    again = caption(config, engine)
    assert (again["captioned"], again["kept"]) == (0, 3)
    captions = [sample.turns[1].text for sample in FolderSource(folder) if isinstance(sample, Sample)]
    assert captions[1] == "My own words."
    rows = list(csv.DictReader((tmp_path / "out" / "captions.csv").open(newline="")))
    assert rows == [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(captions)]
    assert {path.suffix for path in folder.iterdir()} == {".png", ".txt"}  # no temporary file is left

    (folder / "1.jpg").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"1\.jpg and 1\.png would share 1\.txt"):
        caption(config, engine)


def test_a_caption_at_another_detail_is_another_caption(
    engine: TorchEngine, pictures: list[str], tmp_path: Path
) -> None:
    for detail, made in (("high", 1), ("low", 1), ("high", 0), ("low", 0)):
        config = CaptionConfig((pictures[2],), out=tmp_path, detail=detail, max_new_tokens=4)  # type: ignore[arg-type]
        assert caption(config, engine)["captioned"] == made


def test_where_a_batch_of_captions_takes_long_the_next_is_smaller(tmp_path: Path, monkeypatch, capsys) -> None:
    sizes = []

    class Slow:
        tile_size = 32

        def answer_batch(self, questions, *, max_new_tokens: int) -> list[str]:
            sizes.append(len(questions))
            return ["a star"] * len(questions)

    for number in range(15):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("llama3v.engines.captions.PATIENCE", 0.0)
    assert caption(CaptionConfig((str(tmp_path),)), engine=Slow())["captioned"] == 15
    assert sizes == [8, 4, 2, 1]
    assert len(capsys.readouterr().out.splitlines()) == 15
