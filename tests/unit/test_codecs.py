"""Codecs: how far what is read may be from what was written, the exact bytes, and who reads which codec."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_process import GRID, MANIFEST, SHAPE, features_of, key_number
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llama3v import config
from llama3v.errors import CacheError
from llama3v.feature_cache import codecs
from llama3v.feature_cache.codecs import CODECS, Fp8, Int8, Scaled, codec_named
from llama3v.feature_cache.layout import fingerprint_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.records import Record, checksum_of, shard_header
from llama3v.feature_cache.writer import CacheWriter

SCALED = [Int8(), Int8("int8 per token", per_channel=False), Fp8(), Fp8("fp8 per channel", per_channel=True)]
TINIEST = 2.0**-133  # the smallest bf16 value above 0: a result is a multiple of it
EXACT = 1 + 1e-6  # what fp32 arithmetic adds to a bound

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
finite = st.one_of(st.integers(0, 0x7F7F), st.integers(0x8000, 0xFF7F), st.just(0), st.integers(0x3F00, 0x4100))
records = shapes.flatmap(lambda shape: arrays(np.uint16, shape, elements=finite))


def values_of(bits: np.ndarray) -> torch.Tensor:
    """fp64 values of bf16 bits."""
    return torch.from_numpy(bits).view(torch.bfloat16).double()


def round_trip(codec: codecs.Codec, bits: np.ndarray) -> torch.Tensor:
    return codec.decode(np.frombuffer(bytearray(codec.encode(bits)), np.uint8), bits.shape).double()


def scales_of(codec: Scaled, bits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 [n_tiles, tokens, 1] and [width]."""
    data = np.frombuffer(bytearray(codec.encode(bits)), np.uint8)
    scale, channel_scale, _ = codec._views(data, bits.shape)
    return scale.view(*bits.shape[:2], 1).double(), channel_scale.double()


@settings(deadline=None)
@given(records)
def test_bf16_is_read_bit_for_bit(bits: np.ndarray) -> None:
    assert CODECS["bf16"].encode(bits) == bits.tobytes()
    assert np.array_equal(round_trip(CODECS["bf16"], bits), values_of(bits))


@settings(deadline=None)
@given(records)
@pytest.mark.parametrize("codec", [codec for codec in SCALED if isinstance(codec, Int8)], ids=lambda codec: codec.name)
def test_int8_is_off_by_at_most_half_a_step_and_a_rounding_to_bf16(codec: Int8, bits: np.ndarray) -> None:
    values, (scale, channel_scale) = values_of(bits), scales_of(codec, bits)
    error = (round_trip(codec, bits) - values).abs()
    assert (error <= (scale * channel_scale / 2 + values.abs() * 2**-8) * EXACT + TINIEST).all()


@settings(deadline=None)
@given(records)
@pytest.mark.parametrize("codec", [codec for codec in SCALED if isinstance(codec, Fp8)], ids=lambda codec: codec.name)
def test_fp8_is_off_by_at_most_a_sixteenth_or_half_its_smallest_value(codec: Fp8, bits: np.ndarray) -> None:
    values, (scale, channel_scale) = values_of(bits), scales_of(codec, bits)
    error = (round_trip(codec, bits) - values).abs()
    step = scale * channel_scale
    assert (error <= (torch.maximum(values.abs() / 16, step * 2**-10) + values.abs() * 2**-8) * EXACT + TINIEST).all()


@settings(deadline=None)
@given(records)
def test_channel_scales_make_no_step_larger_than_its_tokens_largest_value_asks_for(bits: np.ndarray) -> None:
    scale, channel_scale = scales_of(Int8(), bits)
    assert (channel_scale > 0).all()
    assert (channel_scale <= 1).all()
    plain = values_of(bits).abs().amax(-1, keepdim=True) / 127
    assert (scale * channel_scale <= plain * EXACT + TINIEST).all()


def test_channel_scales_keep_small_channels_apart_from_large_ones() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 9, 64)
    features[..., 5] += 300
    bits = features.bfloat16().view(torch.uint16).numpy()
    others = torch.arange(64) != 5
    per_channel, per_token = (
        (round_trip(codec, bits) - values_of(bits))[..., others].norm() / values_of(bits)[..., others].norm()
        for codec in SCALED[:2]
    )
    assert per_channel < 0.02 < 0.3 < per_token


@pytest.mark.parametrize("codec", SCALED, ids=lambda codec: codec.name)
def test_zeros_stay_zeros(codec: Scaled) -> None:
    bits = features_of(1)
    bits[1, 4] = 0  # a token
    bits[..., 3] = 0  # a channel
    restored = round_trip(codec, bits)
    assert not restored[1, 4].any()
    assert not restored[..., 3].any()
    assert not round_trip(codec, np.zeros_like(bits)).any()


@pytest.mark.parametrize("codec", SCALED, ids=lambda codec: codec.name)
def test_bytes_and_values_do_not_depend_on_how_the_work_is_cut_up(
    codec: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = features_of(3)
    expected, restored = codec.encode(bits), round_trip(codec, bits)
    for part_values in (1, 24, 56):
        monkeypatch.setattr(codecs, "PART_VALUES", part_values)
        assert codec.encode(bits) == expected
        assert torch.equal(round_trip(codec, bits), restored)
    read_only = np.frombuffer(bits.tobytes(), np.uint16).reshape(SHAPE)
    assert codec.encode(read_only) == expected
    assert codec.encode(np.asfortranarray(bits)) == expected


def test_fp8_restores_every_value_as_torch_does() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    stored = stored[(stored & 0x7F) != 0x7F].view(1, -1)  # without NaN
    restored = torch.empty(stored.shape)
    Fp8()._restore(stored, restored)
    assert torch.equal(restored, stored.view(torch.float8_e4m3fn).float())


def test_the_bytes_of_a_record_never_change() -> None:
    """Golden values: a record of today must be readable for ever, and equal features give equal bytes everywhere."""
    features = torch.tensor([[[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [100.0, 3.0, -0.25]]])
    bits = features.bfloat16().view(torch.uint16).numpy()
    assert CODECS["bf16"].encode(bits).hex() == "803f00c0003f000000000000c842404080be"
    # int8: scales 2/127, 0, 100/127; channel scales 1, 1, 1/4; then 9 values and 3 bytes that fill up
    assert CODECS["int8"].encode(bits).hex() == (
        "0402813c000000002693493f" + "0000803f0000803f0000803e" + "4081 7f 000000 7f04ff 000000".replace(" ", "")
    )
    # fp8: scales 2/448, 0, 100/448; no channel scales
    assert CODECS["fp8"].encode(bits).hex() == "2549923b000000004992643e" + "76fe6e 000000 7e55b9 000000".replace(
        " ", ""
    )


def test_a_larger_record_has_the_recorded_checksums() -> None:
    found = {name: checksum_of(codec.encode(features_of(7))).hex() for name, codec in CODECS.items()}
    assert found == {
        "bf16": "44a55eaf7c4f5d523916fb77805329b5",
        "int8": "7918e7e8543f0ab4576b3d5eb0e13ae7",
        "fp8": "fc6ee3e0490b4ad939809588f4319d46",
    }


@given(shapes)
@pytest.mark.parametrize("name", CODECS)
def test_tensors_of_a_shard_lie_without_holes_and_aligned(name: str, shape: tuple[int, int, int]) -> None:
    codec = codec_named(name)
    size = codec.bytes_of(shape)
    made = [Record(key_number(number), 0, size, shape, name, GRID, "00" * 16) for number in range(3)]
    header = json.loads(shard_header(made, "00" * 16)[8:])
    del header["__metadata__"]
    position = 0
    for entry in header.values():
        start, end = entry["data_offsets"]
        item = codecs.ITEM_BYTES[entry["dtype"]]
        assert start == position
        assert start % item == 0
        assert end - start == item * np.prod(entry["shape"])
        position = end
    assert position == 3 * size
    assert [header[record.key]["shape"] for record in made] == [list(shape)] * 3


@pytest.mark.parametrize("codec", [Int8(), Fp8()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("width", [8, 7])  # with and without bytes that fill up
def test_a_shard_opens_with_the_stock_library_and_its_tensors_multiply_to_what_is_read(
    tmp_path: Path, codec: Scaled, width: int
) -> None:
    from safetensors import safe_open

    manifest = {**MANIFEST, "codec": codec.name}
    with CacheWriter(tmp_path, manifest) as writer:
        for number in range(3):
            writer.add_bytes(key_number(number), features_of(number)[..., :width], GRID)
    reader = CacheReader(tmp_path)
    (shard,) = reader.paths.shards.glob("*.safetensors")
    with safe_open(shard, framework="pt") as tensors:
        assert len(list(tensors.keys())) == 3 * len(codec.tensors((3, 9, width)))
        for number in range(3):
            key = key_number(number)
            value = tensors.get_tensor(key).float() * tensors.get_tensor(f"{key}.scale")[..., None]
            if codec.per_channel:
                value *= tensors.get_tensor(f"{key}.channel_scale")
            assert value.shape == (3, 9, width)
            assert torch.equal(reader.read(key), value.bfloat16())
            assert reader.record(key).dtype == codec.name
            assert reader.read_bytes(key) == codec.encode(features_of(number)[..., :width])


@pytest.mark.parametrize("name", CODECS)
def test_a_record_does_not_depend_on_the_type_that_features_came_in(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 9, 8)
    for number, kind in enumerate((features, features.double(), features.bfloat16())):
        with CacheWriter(tmp_path / str(number), {**MANIFEST, "codec": name}) as writer:
            writer.add(key_number(1), kind, GRID)
    assert len({CacheReader(tmp_path / str(number)).content_digest() for number in range(3)}) == 1


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_no_codec_stores_features_that_are_not_finite(tmp_path: Path, name: str, poison: float) -> None:
    features = torch.zeros(3, 9, 8)
    features[1, 4, 2] = poison
    writer = CacheWriter(tmp_path, {**MANIFEST, "codec": name})
    with pytest.raises(CacheError, match="1 NaN or infinite values of 216"):
        writer.add(key_number(1), features, GRID)


def without_codec(manifest: dict[str, str]) -> dict[str, str]:
    return {field: value for field, value in manifest.items() if field != "codec"}


def test_a_reader_that_names_no_codec_takes_the_one_that_is_there(tmp_path: Path) -> None:
    for name in CODECS:
        CacheWriter(tmp_path / name, {**MANIFEST, "codec": name}).close()
        CacheWriter(tmp_path / name, {**MANIFEST, "codec": "bf16", "vision.cut": "1"}).close()  # of another cut
        assert CacheReader(tmp_path / name, without_codec(MANIFEST)).manifest["codec"] == name


def test_several_codecs_want_one_named(tmp_path: Path) -> None:
    for name in ("int8", "bf16"):
        CacheWriter(tmp_path, {**MANIFEST, "codec": name}).close()
    with pytest.raises(CacheError, match=r"holds these features in 2 codecs \(bf16, int8\); .*--codec bf16"):
        CacheReader(tmp_path, without_codec(MANIFEST))
    assert CacheReader(tmp_path, {**MANIFEST, "codec": "int8"}).manifest["codec"] == "int8"
    with pytest.raises(CacheError, match="codec: the cache has int8, asked for fp8"):
        CacheReader(tmp_path, {**MANIFEST, "codec": "fp8"})


def test_a_foreign_cache_is_not_blamed_for_a_codec_that_nobody_asked_for(tmp_path: Path) -> None:
    CacheWriter(tmp_path, {**MANIFEST, "codec": "int8"}).close()
    with pytest.raises(CacheError, match=r"differs in vision.cut: the cache has 2, asked for 1;") as caught:
        CacheReader(tmp_path, without_codec({**MANIFEST, "vision.cut": "1"}))
    assert "codec" not in str(caught.value)


def test_a_writer_must_know_its_codec(tmp_path: Path) -> None:
    for manifest in (without_codec(MANIFEST), {**MANIFEST, "codec": "zip"}):
        with pytest.raises(CacheError, match=r"codec (None|'zip') is unknown; this program has bf16, int8, fp8"):
            CacheWriter(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


def test_messages_name_the_command_with_the_codec(tmp_path: Path) -> None:
    CacheWriter(tmp_path, {**MANIFEST, "codec": "int8"}).close()
    with pytest.raises(CacheError, match="run `llama3v encode --codec int8` on the data"):
        CacheReader(tmp_path).read(key_number(1))


def test_the_options_offer_every_codec() -> None:
    assert list(typing.get_args(config.Codec)) == list(CODECS)
    assert fingerprint_of({**MANIFEST, "codec": "int8"}) != fingerprint_of(MANIFEST)
