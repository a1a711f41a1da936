"""Several writers on one cache: processes at once, parts of a data set, and a Ray cluster, against one process alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama3v.config import CacheConfig, EncodeConfig
from llama3v.data.sources import open_source
from llama3v.errors import ConfigError, DataError
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.tools import cache

IMAGES, BAD = 20, 1
SIZES = [(42, 42), (100, 60), (126, 84)]


@pytest.fixture
def config(tmp_path: Path, tiny_vision_dir: Path) -> EncodeConfig:
    """20 different images, one of them twice, and one that cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(IMAGES):
        size = SIZES[number % len(SIZES)]
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    (folder / "torn.png").write_bytes((folder / "04.png").read_bytes()[:60])
    names = [*(f"{number:02}.png" for number in range(IMAGES)), "copy.png", "torn.png"]
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "noise"}]
    rows = [{"id": name, "image": name, "conversations": turns} for name in names]
    (folder / "train.json").write_text(json.dumps(rows))
    return EncodeConfig(
        data=str(folder / "train.json"),
        vision=str(tiny_vision_dir),
        cache=tmp_path / "cache",
        max_tiles=4,
        batch_tiles=4,
        max_bad_ratio=0.2,
    )


def command(config: EncodeConfig, *more: str) -> list[str]:
    options = {name: str(getattr(config, name)) for name in ("data", "vision", "cache", "max_tiles", "batch_tiles")}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return [sys.executable, "-m", "llama3v", "encode", *words, "--max-bad-ratio", "0.2", *more]


def run_at_once(*commands: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


@pytest.fixture
def alone(config: EncodeConfig, tmp_path: Path) -> EncodeConfig:
    """The same, encoded by one process into a cache of its own."""
    other = replace(config, cache=tmp_path / "alone")
    assert encode(other)["encoded"] == IMAGES
    return other


def assert_equal_content(config: EncodeConfig, alone: EncodeConfig) -> None:
    """Equal records, names and notes; whole to the last byte; and nothing is left to encode."""
    reader, other = CacheReader(config.cache), CacheReader(alone.cache)
    assert reader.content_digest() == other.content_digest()
    assert len(reader) == IMAGES
    digest = open_source(config.data).digest
    for name in (*(f"{number:02}.png" for number in range(IMAGES)), "copy.png"):
        assert reader.key_of(digest, name) == other.key_of(digest, name) is not None
    assert cache(CacheConfig("verify", config.cache))[reader.fingerprint]["damaged"] == []
    again = encode(config)
    assert (again["encoded"], again["bytes"], again["already_cached"], again["left_out"]) == (0, 0, IMAGES + 1, BAD)


def test_two_processes_at_once_leave_the_content_of_one_process(config: EncodeConfig, alone: EncodeConfig) -> None:
    run_at_once(command(config, "--shard-mb", "1"), command(config, "--shard-mb", "1"))
    assert_equal_content(config, alone)
    assert cache(CacheConfig("prune", config.cache, yes=True))  # duplicates of the race go
    assert CacheReader(config.cache).content_digest() == CacheReader(alone.cache).content_digest()


@pytest.mark.slow  # 13 seconds and more; the two writers above stay
def test_processes_that_take_a_part_each_share_the_work(config: EncodeConfig, alone: EncodeConfig) -> None:
    run_at_once(command(config, "--part", "1/2"), command(config, "--part", "2/2"))
    runs = sorted(config.cache.glob("*/runs/*"))
    assert [run.name for run in runs] == ["photos-train-part-1-of-2", "photos-train-part-2-of-2"]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert [summary["samples"] for summary in summaries] == [11, 11]
    # The copy is not in the part of its original, and may be encoded in both.
    assert IMAGES <= sum(summary["encoded"] for summary in summaries) <= IMAGES + 1
    assert_equal_content(config, alone)


def test_parts_are_disjoint_and_complete(config: EncodeConfig) -> None:
    whole = [row.id for row in open_source(config.data)]
    parts = [[row.id for row in open_source(config.data, part=f"{number}/3")] for number in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert open_source(config.data, part="2/3").digest == open_source(config.data).digest
    assert [row.id for row in open_source(config.data, limit=5, part="2/2")] == [whole[1], whole[3]]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_a_part_that_cannot_be_is_refused(part: str) -> None:
    with pytest.raises(ConfigError, match=r"--part is .*; give NUMBER/PARTS"):
        EncodeConfig(data="x", vision="y", cache=Path("z"), part=part)


def test_ray_that_is_not_installed_is_named_with_its_extra(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'llama3v\[ray\]'"):
        encode(replace(config, ray_workers=2))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'llama3v[ray]'")
    import ray

    ray.init(
        num_cpus=2, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.mark.slow  # Ray alone takes 20 seconds and more to start its processes
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
def test_a_ray_cluster_leaves_the_content_of_one_process(
    config: EncodeConfig, alone: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama3v.feature_cache.ray_adapter.SAMPLES_IN_CHUNK", 4)
    shared = replace(config, ray_workers=2)
    summary = encode(shared)
    assert (summary["samples"], summary["images"], summary["left_out"]) == (IMAGES + 2, IMAGES + 2, BAD)
    assert IMAGES <= summary["encoded"] <= IMAGES + 1
    assert summary["encoded"] + summary["duplicates"] + summary["already_cached"] == IMAGES + 1
    (ledger,) = config.cache.glob("*/runs/photos-train/ledger.jsonl")
    assert [json.loads(line)["image"] for line in ledger.read_text().splitlines()] == ["torn.png"]
    assert json.loads(ledger.with_name("summary.json").read_text()) == summary
    assert sum(1 for _ in config.cache.glob("*/shards/*.idx")) >= 2  # each actor committed its own
    assert_equal_content(config, alone)
    again = encode(shared)
    assert (again["encoded"], again["bytes"], again["already_cached"] + again["duplicates"]) == (0, 0, IMAGES + 1)
    with pytest.raises(DataError, match="1 of 22 were left out"):
        encode(replace(shared, max_bad_ratio=0.0))
    with pytest.raises(ConfigError, match="--ray-workers is 3 and the cluster has 2 CPUs"):
        encode(replace(shared, ray_workers=3))
