"""Data sources: every shape that data sets have on disk becomes the same samples, and every bad row a reason."""

import base64
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from llama3v.config import CaptionConfig
from llama3v.data.sources import ImageRef, Rejected, Sample, json_list, open_source
from llama3v.data.sources.conversation import read_conversation
from llama3v.errors import DataError, ImageError
from llama3v.model.prompt import Turn

SHARED = Path(__file__).parents[2].parent / "shared/data"


def picture(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(stream, format="PNG")
    return stream.getvalue()


def rows_of(path: Path, rows: list, limit: int | None = None) -> list[Sample | Rejected]:
    path.write_text(json.dumps(rows))
    return list(open_source(str(path), limit))


def talk(*texts: str) -> list[dict]:
    """LLaVA's conversations: human and gpt in turn."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def reason(item: Sample | Rejected) -> str:
    assert isinstance(item, Rejected), item
    assert "\n" not in item.reason
    return item.reason


def names(sample: Sample | Rejected) -> list[str]:
    assert isinstance(sample, Sample), sample
    return [image.name for image in sample.images]


# What a row says


@pytest.mark.parametrize(
    "prompt", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?", "<image>What is it?"]
)
def test_wherever_the_mark_stands_the_turn_owns_the_image_and_the_text_is_clean(tmp_path, prompt):
    [sample] = rows_of(tmp_path / "a.json", [{"id": 7, "image": "x.png", "conversations": talk(prompt, "A cat.")}])
    assert sample.id == "7"
    assert names(sample) == ["x.png"]
    assert sample.turns == (Turn("user", "What is it?", (0,)), Turn("assistant", "A cat."))


@pytest.mark.parametrize("images", [{}, {"image": None}, {"images": None}, {"images": []}, {"image": ""}])
def test_a_row_without_images_is_a_text_sample(tmp_path, images):
    [sample] = rows_of(tmp_path / "a.json", [{"idx": 3, "conversations": talk("Hello", "Hi"), **images}])
    assert sample == Sample("3", (), (Turn("user", "Hello"), Turn("assistant", "Hi")))


def test_images_belong_to_the_turns_that_mark_them_in_order(tmp_path):
    conversation = talk("<image>\n<image>\nCompare.", "Alike.", "And this? <image>", "Not.", "Why?", "Because.")
    [sample] = rows_of(tmp_path / "a.json", [{"images": ["a", "b", "c"], "conversations": conversation}])
    assert names(sample) == ["a", "b", "c"]
    assert [turn.images for turn in sample.turns if turn.role == "user"] == [(0, 1), (2,), ()]
    assert [turn.text for turn in sample.turns if turn.role == "user"] == ["Compare.", "And this?", "Why?"]


def test_images_without_marks_belong_to_the_first_user_turn(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look."}]
    messages += [{"role": "assistant", "content": "Yes."}]
    [sample] = rows_of(tmp_path / "a.json", [{"images": ["a", "b"], "messages": messages}])
    assert [turn.images for turn in sample.turns] == [(), (0, 1), ()]
    assert sample.turns[0] == Turn("system", "Be brief.")


def test_a_prompt_that_is_only_an_image_stays(tmp_path):
    [sample] = rows_of(tmp_path / "a.json", [{"image": "x", "conversations": talk("<image>", "A cat.")}])
    assert sample.turns[0] == Turn("user", "", (0,))


def test_minicpm_rows_name_their_images(tmp_path):
    conversation = [
        {"role": "user", "content": "<image_01>\nFirst this, then <image_00>"},
        {"role": "assistant", "content": "Good."},
        {"role": "user", "content": "In <image_01>, what is red?"},
        {"role": "assistant", "content": "A hat."},
    ]
    [sample, single] = rows_of(
        tmp_path / "a.json",
        [
            {"image": {"<image_00>": "zero", "<image_01>": "one"}, "conversations": conversation},
            {"image": "one", "conversations": [{"role": "user", "content": "<image>\nHm?"}, conversation[1]]},
        ],
    )
    assert names(sample) == ["one", "zero"]
    assert sample.turns[0] == Turn("user", "First this, then", (0, 1))
    assert sample.turns[2] == Turn("user", "In , what is red?", ())
    assert names(single) == ["one"]


def test_openai_messages_with_parts(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    inline = "data:image/png;base64," + base64.b64encode(picture("blue")).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": inline}},
        {"type": "text", "text": "Which is red?"},
        {"type": "image", "image": "x.png"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]
    [sample] = rows_of(tmp_path / "a.jsonl", [{"messages": messages}])
    assert sample.turns == (Turn("user", "Which is red?", (0, 1)), Turn("assistant", "2"))
    assert sample.images[0].name.startswith("data:")
    assert len(sample.images[0].name) < 50
    assert [image.read() for image in sample.images] == [picture("blue"), picture()]


def test_parts_may_take_their_images_from_the_row(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    [sample] = rows_of(tmp_path / "a.json", [{"images": ["x.png"], "messages": messages}])
    assert names(sample) == ["x.png"]
    assert sample.turns[0] == Turn("user", "What?", (0,))


def test_text_that_looks_like_control_tokens_is_kept(tmp_path):
    text = "What does <|eot_id|> mean? é漢\n\n  code"
    [sample] = rows_of(tmp_path / "a.json", [{"conversations": talk(text, "End.")}])
    assert sample.turns[0].text == text


BAD_ROWS = {
    "no conversation": ({"image": "x"}, "expected a list of messages, found nothing"),
    "empty conversation": ({"conversations": []}, "expected a list of messages"),
    "conversation is a text": ({"conversations": "hello"}, "expected a list of messages, found 'hello'"),
    "message is a text": ({"conversations": ["hello"]}, "message 1: expected an object"),
    "unknown role": ({"conversations": [{"from": "tool", "value": "x"}]}, "message 1: expected a role"),
    "role missing": ({"conversations": [{"value": "x"}]}, "message 1: expected a role"),
    "text missing": ({"conversations": [{"from": "human"}]}, "message 1: expected a text or an image, found nothing"),
    "text is a number": ({"conversations": [{"from": "human", "value": 3}]}, "expected a text or an image, found 3"),
    "no answer": ({"conversations": talk("Why?")}, "the last question has no answer"),
    "answer first": ({"conversations": talk("x", "y", "z")[1:]}, "found assistant first"),
    "two questions": ({"conversations": talk("x") + talk("y", "z")}, "found user after user"),
    "empty answer": ({"conversations": talk("Why?", "  \n")}, "the assistant turn 1 is empty"),
    "empty question": ({"conversations": talk("", "Well.")}, "the user turn 1 is empty"),
    "only a system turn": ({"conversations": [{"from": "system", "value": "x"}]}, "no question and no answer"),
    "mark without image": ({"conversations": talk("<image>\nWhat?", "x")}, "1 <image> marks for 0 images"),
    "more marks": ({"image": "x", "conversations": talk("<image><image>", "x")}, "2 <image> marks for 1 images"),
    "fewer marks": ({"images": ["x", "y"], "conversations": talk("<image>", "x")}, "1 <image> marks for 2 images"),
    "mark in an answer": ({"image": "x", "conversations": talk("a", "<image>")}, "only user turns own images"),
    "lone surrogate": ({"conversations": talk("\ud800", "x")}, "lone surrogate"),
    "image is a number": ({"image": 3, "conversations": talk("a", "b")}, "expected the path of an image, found int"),
    "image on the web": ({"image": "https://x.org/a.jpg", "conversations": talk("a", "b")}, "download the images"),
    "bad base64": ({"image": "data:image/png;base64,!!", "conversations": talk("a", "b")}, "not base64"),
    "not base64": ({"image": "data:image/svg+xml,<svg/>", "conversations": talk("a", "b")}, "expected a base64"),
    "two kinds of images": ({"image": "x", "images": ["y"], "conversations": talk("a", "b")}, "both `image` and"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "expected a text or an image"),
    "images twice": (
        {"images": ["x"], "messages": [{"role": "user", "content": [{"type": "image", "image": "y"}]}]},
        "both beside the messages and inside them",
    ),
    "unknown name": (
        {"image": {"<image_00>": "x"}, "conversations": talk("<image_07>", "x")},
        "mentions <image_07>, which the row does not have",
    ),
    "unmentioned": (
        {"image": {"<image_00>": "x", "<image_01>": "y"}, "conversations": talk("<image_00>", "x")},
        "mentions 1 of 2 images",
    ),
    "a number": (3, "expected an object, found int"),
    "nothing": (None, "expected an object, found NoneType"),
}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_bad_row_is_left_out_with_its_reason_and_the_rest_goes_on(tmp_path, ending):
    good = {"id": "good", "conversations": talk("a", "b")}
    rows = [row for bad, _ in BAD_ROWS.values() for row in (good, bad)] + [good]
    path = tmp_path / f"a{ending}"
    path.write_text(json.dumps(rows) if ending == ".json" else "\n".join(json.dumps(row) for row in rows))
    items = list(open_source(str(path)))
    assert len(items) == len(rows)
    assert [item.id for item in items[::2]] == ["good"] * (len(BAD_ROWS) + 1)  # ids may repeat
    for item, (name, (_, expected)) in zip(items[1::2], BAD_ROWS.items(), strict=True):
        assert expected in reason(item), name
    assert items[1].id == "row 2"


def test_every_image_of_a_sample_is_owned_by_exactly_one_turn(tmp_path):
    conversation = talk("<image>a", "b", "<image><image>c", "d")
    turns, images = read_conversation(conversation, ["x", "y", "z"])
    assert sorted(index for turn in turns for index in turn.images) == list(range(len(images)))


# JSON files


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10_000])
def test_a_list_is_read_the_same_whatever_the_chunk(tmp_path, monkeypatch, chunk):
    rows = [{"a": [1, 2, {"b": ']},[é"\\'}]}, 12345, "x", None, True, [], -1.5e3, {"漢": "𝄞" * 40}, 7]
    path = tmp_path / "a.json"
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), " [ ] ", "[12345]"):
        path.write_text(text, encoding="utf-8")
        assert list(json_list.read_json_list(path)) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"b" 2}]', "after row 1, at '{\"b\" 2}]'"),
        ('[{"a": 1}, {"b": 2', "after row 1"),
        ('[{"a": 1}', "the file ends within the list"),
        ('[{"a": 1} {"b": 2}]', "expected ,"),
        ('[{"a": 1},]', "after row 1"),
        ('[{"a": 1}] and more', "expected the end of the file"),
        ("[" * 100_000, "nested too deeply"),
        ("", "found an empty file"),
        ("id,image\n1,x.png\n", "expected a JSON list"),
    ],
)
def test_a_broken_list_is_an_error_that_names_the_place_after_the_good_rows(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as failure:
        list(open_source(str(path)))
    assert message in str(failure.value)
    assert "a.json" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_list_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        list(open_source(str(path)))


def test_an_endless_element_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "MAX_ROW", 10_000)
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 10_000_000)
    monkeypatch.setattr(json_list, "CHUNK", 1000)
    tracemalloc.start()
    with pytest.raises(DataError, match="after row 0"):
        list(open_source(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_big_list_is_read_in_flat_memory(tmp_path):
    path = tmp_path / "a.json"
    row = json.dumps({"id": "x", "image": "x.png", "conversations": talk("<image>\nWhat?", "word " * 1600)})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 3_000) + "]")  # 25 MB
    source = open_source(str(path))
    tracemalloc.start()
    count = sum(isinstance(item, Sample) for item in source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3_000
    assert path.stat().st_size > 24_000_000
    assert peak < 8_000_000


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    row = json.dumps({"id": "x", "conversations": talk("a", "b")})
    for text in (f"[\r\n{row}\r\n]", f"{row}\r\n\r\n{row}\r\n"):
        (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert all(isinstance(item, Sample) for item in open_source(str(tmp_path / "a.json")))


def test_a_broken_line_is_left_out_and_the_other_lines_stay(tmp_path):
    row = json.dumps({"conversations": talk("a", "b")}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([row, row[:-5], b"", b"\xff\xfe", b"[" * 50_000, row, row[:10]]))
    items = list(open_source(str(path)))
    assert [type(item) for item in items] == [Sample, Rejected, Rejected, Rejected, Sample, Rejected]
    assert "line 2 is not a JSON object" in reason(items[1])
    assert items[1].id == "row 2"
    assert "line 7" in reason(items[-1])


def test_limit_keeps_the_first_rows_and_the_digest(tmp_path):
    rows = [{"id": n, "conversations": talk("a", "b")} for n in range(5)]
    assert [item.id for item in rows_of(tmp_path / "a.json", rows, limit=3)] == ["0", "1", "2"]
    whole, part = open_source(str(tmp_path / "a.json")), open_source(str(tmp_path / "a.json"), 3)
    assert (whole.digest, whole.name) == (part.digest, part.name)
    assert len(list(whole)) == 5
    with pytest.raises(DataError, match="at least 1"):
        open_source(str(tmp_path / "a.json"), 0)


def test_a_source_can_be_read_again_with_the_same_result(tmp_path):
    rows_of(tmp_path / "a.json", [{"image": "x", "conversations": talk("a", "b")}, 3])
    source = open_source(str(tmp_path / "a.json"))
    assert list(source) == list(source)


def test_the_digest_follows_the_content_and_not_the_place(tmp_path):
    rows = [{"conversations": talk("a", "b")}]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        rows_of(tmp_path / folder / "a.json", rows)
    one, two = (open_source(str(tmp_path / folder / "a.json")) for folder in ("one", "two"))
    assert one.digest == two.digest
    assert (one.name, two.name) == ("one-a", "two-a")
    rows_of(tmp_path / "two" / "a.json", [{"conversations": talk("a", "c")}])
    assert open_source(str(tmp_path / "two" / "a.json")).digest != one.digest


# Image files


def test_an_image_is_found_again_by_its_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(picture("red"))
    rows_of(tmp_path / "a.json", [{"image": "sub/a.png", "conversations": talk("a", "b")}])
    for source in (open_source(str(tmp_path / "a.json"), limit=1, part="1/1"), open_source(str(tmp_path))):
        [[image]] = [item.images for item in source if isinstance(item, Sample)]
        assert source.image(image.name) == image
        assert source.image(image.name).read() == picture("red")


def test_an_image_inside_the_data_file_is_not_found_again(tmp_path):
    address = "data:image/png;base64," + base64.b64encode(picture()).decode()
    [sample] = rows_of(tmp_path / "a.json", [{"image": address, "conversations": talk("a", "b")}])
    with pytest.raises(DataError, match="cannot be found again by its name"):
        open_source(str(tmp_path / "a.json")).image(sample.images[0].name)


def test_images_are_found_beside_the_file_then_in_images_and_outside(tmp_path):
    data = tmp_path / "data"
    (data / "images" / "sub").mkdir(parents=True)
    (data / "beside.png").write_bytes(picture("red"))
    (data / "images" / "sub" / "within.png").write_bytes(picture("green"))
    (tmp_path / "outside.png").write_bytes(picture("blue"))
    paths = ["beside.png", "sub/within.png", "images/sub/within.png", "../outside.png", str(tmp_path / "outside.png")]
    items = rows_of(data / "a.json", [{"image": path, "conversations": talk("a", "b")} for path in paths])
    assert [names(item) for item in items] == [[path] for path in paths]
    colours = ["red", "green", "green", "blue", "blue"]
    assert [item.images[0].read() for item in items] == [picture(colour) for colour in colours]


def test_a_missing_image_is_an_image_error_when_it_is_read_and_not_before(tmp_path):
    [sample, folder] = rows_of(tmp_path / "a.json", [{"image": name, "conversations": talk("a", "b")} for name in "x."])
    with pytest.raises(ImageError, match="x: no such file"):
        sample.images[0].read()
    with pytest.raises(ImageError, match="found a directory"):
        folder.images[0].read()


# What can be opened


def test_what_is_no_data_set_is_said(tmp_path):
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "empty").mkdir()
    for spec, message in [
        ("absent.json", "no such file or folder"),
        ("photo.png", r"expected a .json, .jsonl or .parquet file or a folder of images, found .png"),
        ("empty", "expected images"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / spec))


def test_opening_a_json_file_needs_no_torch_and_no_pyarrow(tmp_path):
    rows_of(tmp_path / "a.json", [{"conversations": talk("a", "b")}])
    program = (
        "import sys; from llama3v.data.sources import open_source; "
        f"list(open_source({str(tmp_path / 'a.json')!r})); "
        "assert not {'torch', 'pyarrow', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# Folders


def test_a_folder_pairs_images_with_the_captions_beside_them(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.txt").write_text(" A red square.\n", encoding="utf-8-sig")
    (tmp_path / "notes.txt").write_text("no image has this name")
    items = list(open_source(str(tmp_path)))
    assert [item.id for item in items] == ["a.jpg", "b.PNG", "sub/c.webp"]
    assert [names(item) for item in items] == [["a.jpg"], ["b.PNG"], ["sub/c.webp"]]
    assert items[0].turns == (Turn("user", CaptionConfig.prompt, (0,)), Turn("assistant", "A red square."))
    assert items[1].turns == items[2].turns == ()  # can be encoded, not learnt from
    assert all(item.images[0].read() == picture() for item in items)


@pytest.mark.parametrize("listing", ["metadata.jsonl", "captions.jsonl"])
def test_a_folder_takes_captions_from_a_listing(tmp_path, listing):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(picture())
    lines = [
        {"file_name": "a.png", "text": "One."},
        {"file_name": "a.png", "text": "Uno."},
        {"file_name": "sub/c.png", "text": "Three."},
        {"file_name": "gone.png", "text": "Lost."},
        {"file_name": "b.png"},
        {"file_name": "b.png", "text": " "},
    ]
    (tmp_path / listing).write_text("\n".join(json.dumps(line) for line in lines) + "\nbroken\n")
    items = list(open_source(str(tmp_path)))
    samples = [item for item in items if isinstance(item, Sample)]
    assert [(item.id, item.turns[1].text if item.turns else None) for item in samples] == [
        ("a.png", "One."),
        ("a.png", "Uno."),
        ("b.png", None),
        ("sub/c.png", "Three."),
    ]
    rejected = {item.id: item.reason for item in items if isinstance(item, Rejected)}
    assert set(rejected) == {f"{listing} line {number}" for number in (5, 6, 7)} | {"gone.png"}
    assert "no such image" in rejected["gone.png"]


def test_a_caption_that_cannot_be_read_is_left_out_with_a_reason(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "c.txt").mkdir()
    first, second, third = open_source(str(tmp_path))
    assert reason(first) == "its caption a.txt is empty"
    assert "b.txt cannot be read" in reason(second)
    assert "c.txt cannot be read" in reason(third)


def test_the_digest_of_a_folder_follows_names_and_sizes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(picture())
    digest = open_source(str(tmp_path / "one")).digest
    assert open_source(str(tmp_path / "two")).digest == digest
    (tmp_path / "two" / "a.png").rename(tmp_path / "two" / "b.png")
    assert open_source(str(tmp_path / "two")).digest != digest
    (tmp_path / "one" / "a.png").write_bytes(picture() + b"x")
    assert open_source(str(tmp_path / "one")).digest != digest


def test_file_names_that_are_no_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(picture())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_source(str(tmp_path))
    assert len(source.digest) == 32
    assert [item.images[0].read() for item in source] == [picture()]


# Real data, where it is at hand


@pytest.mark.parametrize(
    ("spec", "samples"),
    [("llava_pretrain_2k/train.json", 2183), ("flickr8k/dev.json", 5000), ("daquar/train.parquet", 794)],
)
def test_real_data_sets_are_read_without_a_single_rejection(spec, samples):
    if not (SHARED / spec).exists():
        pytest.skip(f"{SHARED / spec} is not on this machine (development data, not part of the repository)")
    items = list(open_source(str(SHARED / spec)))
    assert len(items) == samples
    assert all(isinstance(item, Sample) and len(item.images) == 1 for item in items)
    assert all("<image>" not in turn.text for item in items for turn in item.turns)
    assert all(isinstance(item.images[0], ImageRef) and item.images[0].read() for item in items[:20])
