"""Parquet with images inside: every layout becomes samples, and no image is loaded before it is asked for."""

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from llama3v.data.sources import Rejected, Sample, open_source
from llama3v.errors import DataError, ImageError
from llama3v.model.prompt import Turn

arrow = pytest.importorskip("pyarrow", reason="parquet is an extra: pip install 'llama3v[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")


def picture(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(stream, format="PNG")
    return stream.getvalue()


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


def write_parquet(path: Path, columns: dict, group: int | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=group, **options)


def image_column(values: list, many: bool):
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return arrow.array(values, arrow.list_(image) if many else image)


def inside(colour: str) -> dict:
    return {"bytes": picture(colour), "path": f"{colour}.png"}


def pairs(*texts: str) -> list[dict]:
    return [{"user": user, "assistant": answer} for user, answer in zip(texts[::2], texts[1::2], strict=True)]


def test_the_cauldron_rows_become_conversations_whose_first_turn_owns_the_images(tmp_path):
    images = [[inside("red"), inside("blue")], [inside("green")], None, [], [None, inside("red")]]
    texts = [pairs("<image>a", "b", "c", "d")] + [pairs("a", "b")] * 4
    path = tmp_path / "a.parquet"
    write_parquet(path, {"images": image_column(images, many=True), "texts": texts})
    items = list(open_source(str(path)))
    assert items[0].turns == (
        Turn("user", "a", (0, 1)),
        Turn("assistant", "b"),
        Turn("user", "c"),
        Turn("assistant", "d"),
    )
    assert [item.id for item in items] == [f"a.parquet#{row}" for row in range(5)]
    assert names(items[0]) == ["a.parquet#0/0", "a.parquet#0/1"]
    assert names(items[4]) == ["a.parquet#4/1"]
    colours = [[image.read() for image in item.images] for item in items]
    assert colours == [[picture("red"), picture("blue")], [picture("green")], [], [], [picture("red")]]


def test_onevision_rows_are_llava_conversations_in_parquet(tmp_path):
    columns = {
        "id": ["x", "y", None],
        "image": image_column([inside("red"), None, inside("blue")], many=False),
        "conversations": [talk("<image>\nWhat?", "Red."), talk("Hello", "Hi"), talk("Look. <image>", "Blue.")],
        "data_source": ["s"] * 3,
    }
    write_parquet(tmp_path / "a.parquet", columns)
    items = list(open_source(str(tmp_path / "a.parquet")))
    assert [item.id for item in items] == ["x", "y", "a.parquet#2"]
    assert items[0].turns[0] == Turn("user", "What?", (0,))
    assert items[1].images == ()
    assert [image.read() for item in items for image in item.images] == [picture("red"), picture("blue")]


def test_images_as_plain_bytes_or_as_paths_are_read_too(tmp_path):
    (tmp_path / "x.png").write_bytes(picture("blue"))
    write_parquet(tmp_path / "b.parquet", {"image": [picture(), b""], "texts": [pairs("a", "b")] * 2})
    write_parquet(tmp_path / "p.parquet", {"image": ["x.png", "gone.png"], "texts": [pairs("a", "b")] * 2})
    whole, empty = open_source(str(tmp_path / "b.parquet"))
    assert whole.images[0].read() == picture()
    with pytest.raises(ImageError, match=r"b\.parquet#1/0: the image has neither bytes nor a path"):
        empty.images[0].read()
    there, gone = open_source(str(tmp_path / "p.parquet"))
    assert there.images[0].read() == picture("blue")
    with pytest.raises(ImageError, match="no such file"):
        gone.images[0].read()


def test_bad_parquet_rows_are_left_out_with_a_reason(tmp_path):
    texts = [None, [], pairs("a", "b"), pairs("a", ""), [{"user": "a", "assistant": None}], pairs("a", "b")]
    write_parquet(tmp_path / "a.parquet", {"texts": texts})
    items = list(open_source(str(tmp_path / "a.parquet")))
    assert [isinstance(item, Sample) for item in items] == [False, False, True, False, False, True]
    assert "expected a list of messages, found nothing" in reason(items[0])
    assert "the assistant turn 1 is empty" in reason(items[3])


def test_text_that_is_not_utf8_spoils_only_its_row(tmp_path):
    kind = arrow.list_(arrow.struct([("user", arrow.binary()), ("assistant", arrow.binary())]))
    texts = arrow.array([pairs(b"a", b"b"), pairs(b"\xff\xfe", b"b"), pairs(b"c", b"d")], kind)
    as_text = arrow.list_(arrow.struct([("user", arrow.string()), ("assistant", arrow.string())]))
    unchecked = arrow.Array.from_buffers(
        as_text, 3, texts.buffers()[:2], children=[_as_text(texts.values, as_text.value_type)]
    )
    write_parquet(tmp_path / "a.parquet", {"texts": unchecked})
    items = list(open_source(str(tmp_path / "a.parquet")))
    assert [isinstance(item, Sample) for item in items] == [True, False, True]
    assert "not UTF-8" in reason(items[1])


def _as_text(struct, kind):
    """The same buffers, called text without a check: what a careless writer leaves on disk."""
    children = [arrow.Array.from_buffers(arrow.string(), len(struct), struct.field(n).buffers()) for n in range(2)]
    return arrow.Array.from_buffers(kind, len(struct), struct.buffers()[:1], children=children)


@pytest.mark.parametrize("group", [None, 7])
def test_images_can_be_read_in_any_order_and_across_row_groups(tmp_path, group):
    images = [[{"bytes": bytes([row]) * 5, "path": None}] for row in range(50)]
    path = tmp_path / "a.parquet"
    write_parquet(path, {"images": image_column(images, many=True), "texts": [pairs("a", "b")] * 50}, group)
    items = list(open_source(str(path)))
    for row in [*range(50), 49, 0, 17, 16, 15, 48, 3]:
        assert items[row].images[0].read() == bytes([row]) * 5


def test_a_directory_of_parquet_files_is_one_source(tmp_path):
    for name, colour in (("b.parquet", "blue"), ("a.parquet", "red"), ("sub/c.parquet", "green")):
        columns = {"images": image_column([[inside(colour)]], many=True), "texts": [pairs("a", "b")]}
        write_parquet(tmp_path / name, columns)
    items = list(open_source(str(tmp_path)))
    assert [names(item)[0] for item in items] == ["a.parquet#0/0", "b.parquet#0/0", "sub/c.parquet#0/0"]
    assert [item.images[0].read() for item in items] == [picture(colour) for colour in ("red", "blue", "green")]


def test_an_image_is_found_again_by_its_name(tmp_path):
    for name in ("b.parquet", "sub/a#1.parquet"):
        images = [[{"bytes": f"{name} {row} {place}".encode(), "path": None} for place in "01"] for row in range(3)]
        write_parquet(tmp_path / name, {"images": image_column(images, many=True), "texts": [pairs("a", "b")] * 3})
    source = open_source(str(tmp_path), limit=5, part="1/2")
    images = [image for item in source for image in item.images]
    assert len(images) == 6
    for image in reversed(images):
        assert source.image(image.name).read() == image.read()


def test_a_parquet_file_is_iterated_without_loading_its_images(tmp_path):
    images = [[{"bytes": os.urandom(200_000), "path": f"{row}.png"}] for row in range(200)]  # 40 MB, one row group
    path = tmp_path / "a.parquet"
    columns = {"images": image_column(images, many=True), "texts": [pairs("a", "b")] * 200}
    write_parquet(path, columns, write_batch_size=8)  # pages of about a megabyte
    before = arrow.total_allocated_bytes()
    items, most = [], 0
    for item in open_source(str(path)):
        items.append(item)
        most = max(most, arrow.total_allocated_bytes() - before)
    assert most < 5_000_000
    for item, [image] in zip(items, images, strict=True):
        assert item.images[0].read() == image["bytes"]
        most = max(most, arrow.total_allocated_bytes() - before)
    assert most < 10_000_000


@pytest.mark.parametrize("damage", ["truncated", "no parquet", "empty"])
def test_a_broken_parquet_file_is_an_error_of_one_line(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"texts": [pairs("a", "b")]})
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-9], "no parquet": b"hello, world " * 9, "empty": b""}[damage])
    for use in (list, lambda source: source.digest):
        with pytest.raises(DataError, match=r"a\.parquet: not a whole parquet file") as failure:
            use(open_source(str(path)))
        assert "\n" not in str(failure.value)


def test_a_damaged_image_page_is_an_image_error(tmp_path):
    images = [[{"bytes": b"0123456789" * 50, "path": None}] for _ in range(5)]
    path = tmp_path / "a.parquet"
    columns = {"images": image_column(images, many=True), "texts": [pairs("a", "b")] * 5}
    write_parquet(path, columns, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = data.index(b"\x28\xb5\x2f\xfd")  # the first zstd frame: the image bytes
    data[start : start + 30] = bytes(30)
    path.write_bytes(data)
    items = list(open_source(str(path)))
    assert all(isinstance(item, Sample) for item in items)
    with pytest.raises(ImageError, match=r"a\.parquet#0/0: cannot be read") as failure:
        items[0].images[0].read()
    assert "\n" not in str(failure.value)


def test_a_parquet_file_without_text_names_its_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"caption": ["x"], "url": ["y"]})
    with pytest.raises(DataError, match="found caption, url"):
        list(open_source(str(tmp_path / "a.parquet")))


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"texts": [pairs("a", "b")]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'llama3v\[parquet\]'"):
        list(open_source(str(tmp_path / "a.parquet")))


def test_the_parquet_digest_follows_the_content_and_not_the_place(tmp_path):
    for folder, answer in (("one", "b"), ("two", "b"), ("three", "c")):
        write_parquet(tmp_path / folder / "a.parquet", {"texts": [pairs("a", answer)]})
    one, two, three = (open_source(str(tmp_path / folder)).digest for folder in ("one", "two", "three"))
    assert one == two
    assert one != three
