"""info, verify, prune and export: what they count, what they refuse, and what others can do with an export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_process import MANIFEST, RECORD_BYTES, features_of, key_number, write
from prune_process import FINGERPRINT, INSIDE, KEPT, KEPT_IMAGES, OTHER, RECORDS, make_cache, prune

from llama3v import cli
from llama3v.config import CacheConfig
from llama3v.errors import CacheError, ConfigError
from llama3v.feature_cache import prune_plan
from llama3v.feature_cache.index import Index
from llama3v.feature_cache.layout import CachePaths, fingerprint_of, manifest_of
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.tools import cache
from llama3v.feature_cache.writer import CacheWriter
from llama3v.model.slicing import Grid


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_info_counts_logical_records_and_says_what_the_features_are_made_of(root: Path) -> None:
    found = cache(CacheConfig("info", root))[FINGERPRINT]
    assert (found["records"], found["tiles"], found["bytes"]) == (RECORDS, 3 * RECORDS, RECORDS * RECORD_BYTES)
    assert found["codecs"] == ["bf16"]
    assert found["images named, by source"] == {KEPT: len(KEPT_IMAGES), OTHER: 8, INSIDE: 3}
    assert found["made from"] == MANIFEST
    assert len(found["unfinished files"]) == 1


@pytest.mark.parametrize("action", ["info", "verify", "prune"])
def test_a_report_says_in_json_what_the_terminal_says(root: Path, tmp_path: Path, action: str) -> None:
    results = cache(CacheConfig(action, root, out=tmp_path / "reports"))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "reports" / f"{action}.json").read_text())
    assert report["fingerprints"] == results
    assert (report["action"], report["cache"]) == (action, str(root))


def test_verify_exits_with_0_only_where_every_byte_is_right_and_reports_either_way(root: Path, tmp_path: Path) -> None:
    command = ["cache", "verify", str(root), "--out", str(tmp_path / "reports")]
    assert cli.main(command) == 0
    reader = CacheReader(root)
    record = reader.record(key_number(2))
    path = reader.paths.shard(record.shard)
    data = bytearray(path.read_bytes())
    data[record.offset] ^= 1
    path.write_bytes(data)
    assert cli.main(command) == 2
    report = json.loads((tmp_path / "reports/verify.json").read_text())["fingerprints"][FINGERPRINT]
    assert report["damaged"] == [
        {"shard": record.shard, "key": record.key, "reason": "its bytes do not match their checksum"}
    ]
    assert report["waiting to be encoded anew"] == [record.key]
    assert report["data sets"][KEPT] == {"names": len(KEPT_IMAGES), "without a record": 1, "unreadable lines": 0}
    assert cli.main(command) == 2  # it still waits
    write(str(root), range(RECORDS), 4)
    assert cli.main(command) == 0


def test_verify_tells_lines_that_cannot_be_read(root: Path) -> None:
    refs = CachePaths(root, FINGERPRINT).refs(KEPT)
    refs.write_bytes(refs.read_bytes() + b'{"name": "torn')
    found = cache(CacheConfig("verify", root))[FINGERPRINT]["data sets"][KEPT]
    assert found == {"names": len(KEPT_IMAGES), "without a record": 0, "unreadable lines": 1}


def test_a_prune_without_yes_changes_nothing_and_tells_what_a_prune_with_it_does(root: Path) -> None:
    before = snapshot(root)
    told = prune(root, KEPT, yes=False)
    assert {path: data for path, data in snapshot(root).items() if path.name != "writers.lock"} == {
        path: data for path, data in before.items() if path.name != "writers.lock"
    }
    used = sum(path.stat().st_size for path in (root / FINGERPRINT / "shards").glob("*.safetensors"))
    did = prune(root, KEPT)
    assert {name: value for name, value in told.items() if name != "done"} == {
        name: value for name, value in did.items() if name not in ("done", "found damaged")
    }
    assert used - sum(path.stat().st_size for path in (root / FINGERPRINT / "shards").glob("*.safetensors")) > 0


def test_prune_without_keep_takes_only_duplicates_and_what_is_set_aside(root: Path) -> None:
    digest = CacheReader(root).content_digest()
    found = {reason: count["records"] for reason, count in prune(root)["records that go"].items()}
    assert found == {"not named": 0, "duplicates": 2, "set aside": 1}
    assert CacheReader(root).content_digest() == digest
    assert sorted(path.stem for path in (root / FINGERPRINT / "refs").iterdir()) == [KEPT, OTHER, INSIDE]


def test_prune_keeps_the_names_of_data_sets_that_lose_nothing(root: Path) -> None:
    prune(root, KEPT)
    assert sorted(path.stem for path in (root / FINGERPRINT / "refs").iterdir()) == [KEPT, INSIDE]


def test_prune_keeps_the_union_of_what_several_data_sets_name(root: Path) -> None:
    result = prune(root, KEPT, OTHER)
    assert result["records that stay"] == RECORDS
    assert result["records that go"]["not named"]["records"] == 0


def test_prune_refuses_a_data_set_that_the_cache_does_not_know(root: Path) -> None:
    with pytest.raises(CacheError, match=f"knows no data set {'d' * 32}.*llama3v encode"):
        prune(root, KEPT, "d" * 32)


def test_a_pruned_cache_is_filled_again_by_the_writer_to_equal_content(root: Path) -> None:
    digest = CacheReader(root).content_digest()
    prune(root, KEPT)
    assert write(str(root), range(RECORDS), 4) == RECORDS - len(KEPT_IMAGES)
    assert CacheReader(root).content_digest() == digest


@pytest.mark.parametrize("codec", ["bf16", "int8", "fp8"])
def test_prune_moves_records_of_any_codec_byte_for_byte(tmp_path: Path, codec: str) -> None:
    manifest = manifest_of({"vision.cut": "2"}, tile_size=42, max_tiles=4, codec=codec)
    torch.manual_seed(0)
    with CacheWriter(tmp_path, manifest) as writer:
        for number in range(6):
            writer.add(key_number(number), torch.randn(3, 9, 8), Grid(2, 1))
    paths = CachePaths(tmp_path, fingerprint_of(manifest))
    index = Index(paths)
    index.refresh()
    index.set_aside([(record.shard, record.key, "a test") for record in list(index.records())[:2]])
    reader = CacheReader(tmp_path)
    before = {key: (reader.read_bytes(key), reader.read(key)) for key in reader.keys()}  # noqa: SIM118
    del writer
    assert cache(CacheConfig("prune", tmp_path, yes=True))[paths.fingerprint]["shards written anew"] == 1
    after = CacheReader(tmp_path)
    assert set(after.keys()) == set(before)
    for key, (data, features) in before.items():
        assert after.read_bytes(key) == data
        assert torch.equal(after.read(key), features)
    from safetensors import safe_open

    (shard,) = paths.shards.glob("*.safetensors")  # the old one is gone
    with safe_open(shard, framework="pt") as tensors:  # the new shard's header is right for other tools
        assert set(before) <= {name.partition(".")[0] for name in tensors.keys()}  # noqa: SIM118


def test_a_plan_of_an_empty_cache_is_empty(tmp_path: Path) -> None:
    CacheWriter(tmp_path, MANIFEST)
    paths = CachePaths(tmp_path, FINGERPRINT)
    plan = prune_plan.make_plan(paths, Index(paths), None)
    assert (plan.kept_records, plan.unused, plan.partly_used, plan.bytes_freed) == (0, [], {}, 0)


def test_an_export_is_read_by_image_name_with_safetensors_and_json_alone(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "plain"
    result = cache(CacheConfig("export", root, out=out))[FINGERPRINT]
    assert result["records"] == RECORDS
    images = json.loads((out / "images.json").read_text())
    assert set(images) == {KEPT, OTHER, INSIDE}
    for number in KEPT_IMAGES:
        place = images[KEPT][f"{number}.png"]
        features = load_file(out / place["file"])[place["key"]]
        assert features.dtype == torch.bfloat16
        assert np.array_equal(features.view(torch.uint16).numpy(), features_of(number))
        assert place["grid"] == [2, 1]


def test_an_export_has_several_files_and_keeps_to_what_was_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    config = CacheConfig("export", root, out=tmp_path / "plain", keep=(INSIDE,), limit=2)
    object.__setattr__(config, "file_mb", 0)  # a file for every record
    assert cache(config)[FINGERPRINT]["files"] == 2
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    keys = [key for path in files for key in load_file(path)]
    assert keys == sorted(key_number(number) for number in (1, 2, 8))[:2]
    images = json.loads((tmp_path / "plain/images.json").read_text())
    assert {place["key"] for place in images[INSIDE].values()} == set(keys)
    assert set(images) == {INSIDE}
    with pytest.raises(CacheError, match="is not empty"):
        cache(config)


def test_export_wants_one_fingerprint(root: Path, tmp_path: Path) -> None:
    CacheWriter(root, {**MANIFEST, "vision.cut": "1"})
    with pytest.raises(CacheError, match=r"holds 2 fingerprints .* --fingerprint"):
        cache(CacheConfig("export", root, out=tmp_path / "plain"))
    assert cache(CacheConfig("export", root, out=tmp_path / "plain", fingerprint=FINGERPRINT))
    with pytest.raises(CacheError, match="has no fingerprint abc"):
        cache(CacheConfig("info", root, fingerprint="abc"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"action": "info", "keep": ("x",)}, "--keep has no meaning for info"),
        ({"action": "export", "out": Path("x"), "yes": True}, "--yes has no meaning for export"),
        ({"action": "verify", "limit": 3}, "--limit has no meaning for verify"),
        ({"action": "export"}, "export needs a directory"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CacheConfig(**{"cache": Path("cache"), **options})
