"""The encode pass on a tiny random tower: what it keeps, what it skips, and what a kill costs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama3v.config import CacheConfig, EncodeConfig
from llama3v.data.sources import open_source
from llama3v.errors import CacheError, ConfigError, DataError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import CRASH_EXIT_CODE
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.encoders.torch import best_device
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.tools import cache
from llama3v.model.tiles import decode_image, image_key, make_tiles, to_pixels
from llama3v.model.vision import load_tower

IMAGES = 24
CHECKS = 2  # passes in which an engine is held against torch, before the first image
SIZES = [(42, 42), (100, 60), (60, 130), (126, 84), (30, 200)]


def draw(path: Path, number: int) -> None:
    size = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 6, size[0] // 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A LLaVA JSON with 24 different images, one of them three times under two names, and a text-only sample."""
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{number:02}.png" for number in range(IMAGES)]
    for number, name in enumerate(names):
        draw(folder / name, number)
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    rows: list[dict] = [{"id": name, "image": name} for name in [*names, "copy.png", "03.png"]]
    rows.insert(5, {"id": "text only"})
    for row in rows:
        row["conversations"] = [
            {"from": "human", "value": ("<image>\n" if "image" in row else "") + "What is this?"},
            {"from": "gpt", "value": "noise"},
        ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


@pytest.fixture
def config(photos: Path, tiny_vision_dir: Path, tmp_path: Path) -> EncodeConfig:
    return EncodeConfig(
        data=str(photos), vision=str(tiny_vision_dir), cache=tmp_path / "cache", max_tiles=4, batch_tiles=5
    )


def with_options(config: EncodeConfig, **options: object) -> EncodeConfig:
    return EncodeConfig(**{**config.__dict__, **options})  # type: ignore[arg-type]


def test_every_image_is_cached_once_with_the_features_of_the_tower(config: EncodeConfig, photos: Path) -> None:
    summary = encode(config)
    counted = {
        name: summary[name] for name in ("samples", "images", "encoded", "duplicates", "already_cached", "left_out")
    }
    assert counted == {
        "samples": 27, "images": 26, "encoded": 24, "duplicates": 2, "already_cached": 0, "left_out": 0,
    }  # fmt: skip
    reader, source, tower = CacheReader(config.cache), open_source(config.data), load_tower(config.vision)
    assert len(reader) == 24
    tiles = 0
    for number in range(IMAGES):
        name = f"{number:02}.png"
        key = reader.key_of(source.digest, name)
        assert key == image_key((photos.parent / name).read_bytes())
        cut = make_tiles(decode_image((photos.parent / name).read_bytes()), tower.tile_size, config.max_tiles)
        with torch.no_grad():
            expected = tower.trunk(to_pixels(cut.pixels, tower.mean, tower.std)).to(torch.bfloat16)
        assert reader.record(key).grid == cut.grid
        torch.testing.assert_close(reader.read(key), expected, rtol=0.01, atol=0.01)
        tiles += len(cut.pixels)
    assert reader.key_of(source.digest, "copy.png") == reader.key_of(source.digest, "03.png")
    assert summary["tiles"] == tiles > IMAGES
    assert summary["bytes"] == tiles * 9 * 32 * 2
    assert summary["fingerprint"] == reader.fingerprint
    assert 0 <= summary["wait_share"] < 1
    assert (summary["engine"], summary["precision"], summary["device"]) == ("torch", "fp32", str(best_device()))
    (saved,) = config.cache.glob("*/runs/*/summary.json")
    assert json.loads(saved.read_text()) == summary


def test_a_second_run_encodes_nothing_and_changes_nothing(config: EncodeConfig) -> None:
    encode(config)
    directory = CacheReader(config.cache).paths.directory
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    summary = encode(config)
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert (summary["encoded"], summary["tiles"], summary["bytes"]) == (0, 0, 0)
    assert (summary["already_cached"], summary["duplicates"]) == (26, 0)
    assert summary["engine"] is None  # none was opened
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {"summary.json"}


def test_moved_and_renamed_images_are_not_encoded_again(config: EncodeConfig, photos: Path) -> None:
    encode(config)
    moved = photos.parent.with_name("elsewhere")
    photos.parent.rename(moved)
    (moved / "train.json").unlink()
    summary = encode(with_options(config, data=str(moved)))  # the same images as a folder
    assert (summary["encoded"], summary["already_cached"]) == (0, 25)


def test_features_do_not_depend_on_what_else_is_in_the_batch(config: EncodeConfig, tmp_path: Path) -> None:
    """So an interrupted pass leaves the same bits as one that was not."""
    encode(config)
    other = with_options(config, cache=tmp_path / "other")
    for limit in (2, 9, 10, None):
        encode(with_options(other, limit=limit))
    digests = {CacheReader(root).content_digest() for root in (config.cache, other.cache)}
    assert len(digests) == 1


def test_another_cut_or_slicing_has_a_fingerprint_of_its_own(config: EncodeConfig) -> None:
    fingerprints = {
        encode(with_options(config, **options))["fingerprint"]
        for options in ({}, {"cut": 1}, {"max_tiles": 0}, {"batch_tiles": 3})
    }
    assert len(fingerprints) == 3
    with pytest.raises(CacheError, match="holds 3 fingerprints"):
        CacheReader(config.cache)


def test_bf16_is_close_to_fp32(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    lower = with_options(config, precision="bf16", cache=tmp_path / "bf16")
    encode(lower)
    exact, rounded = CacheReader(config.cache), CacheReader(lower.cache)
    for key in exact.keys():  # noqa: SIM118
        one, two = exact.read(key).float().flatten(), rounded.read(key).float().flatten()
        assert torch.cosine_similarity(one, two, dim=0) > 0.999


def test_bad_images_are_left_out_with_their_reasons(config: EncodeConfig, photos: Path) -> None:
    folder = photos.parent
    (folder / "05.png").write_bytes(b"")
    (folder / "06.png").write_text("<html>404</html>")
    (folder / "07.png").unlink()
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:100])
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    summary = encode(with_options(config, max_bad_ratio=0.5))
    assert (summary["encoded"], summary["left_out"]) == (20, 6)  # 03 twice, and its copy
    (ledger,) = config.cache.glob("*/runs/*/ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sorted(entry["image"] for entry in entries) == [
        "03.png", "03.png", "05.png", "06.png", "07.png", "copy.png",
    ]  # fmt: skip
    assert all(entry["reason"] for entry in entries)
    reader = CacheReader(config.cache)
    quarantined = {entry["name"] for entry in journal.read(reader.paths.quarantine)}
    assert quarantined == {"03.png", "05.png", "06.png", "07.png", "copy.png"}
    digest = open_source(config.data).digest
    assert reader.key_of(digest, "03.png") is None
    assert reader.key_of(digest, "04.png") is not None
    again = encode(with_options(config, max_bad_ratio=0.5))
    assert (again["encoded"], again["left_out"]) == (0, 6)
    assert len(ledger.read_text().splitlines()) == 6


def test_too_many_bad_images_stop_the_run_and_it_says_which(config: EncodeConfig, photos: Path) -> None:
    for number in (5, 6, 7):
        (photos.parent / f"{number:02}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3 of 26 were left out.*05\.png"):
        encode(config)
    assert len(CacheReader(config.cache)) == 21  # what is good is kept


def test_a_wrong_folder_of_images_stops_early(
    config: EncodeConfig, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama3v.feature_cache.encode.EARLIEST_STOP", 10)
    for path in photos.parent.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="10 of 10 were left out"):
        encode(config)


def test_a_broken_row_is_left_out_and_counted(config: EncodeConfig, photos: Path) -> None:
    rows = json.loads(photos.read_text())
    photos.write_text(json.dumps([*rows, {"id": "broken", "conversations": 7}]))
    summary = encode(config)
    assert (summary["samples"], summary["left_out"], summary["encoded"]) == (28, 1, 24)


def test_features_that_are_not_finite_stop_the_run_and_name_the_image(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama3v.model.vision import SiglipTower

    real, passes = SiglipTower.trunk, []

    def poisoned(tower: SiglipTower, pixels: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        features = real(tower, pixels)
        if len(passes) > CHECKS:
            features[0, 4, 2] = float("nan")
        return features

    monkeypatch.setattr(SiglipTower, "trunk", poisoned)
    with pytest.raises(CacheError, match=r"image [0-9a-f]{32} \(00\.png\) have 1 NaN or infinite"):
        encode(config)


def test_a_damaged_record_is_found_by_verify_and_encoded_anew(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(config)
    whole = CacheReader(config.cache).content_digest()
    reader = CacheReader(config.cache)
    record = list(reader.records())[7]
    path = reader.paths.shard(record.shard)
    data = bytearray(path.read_bytes())
    data[record.offset + 11] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # the second time it is known, and still waits
        with pytest.raises(CacheError, match="run `llama3v encode` again") as caught:
            cache(CacheConfig("verify", config.cache))
    assert "no new damage; 1 known images wait" in str(caught.value)
    capsys.readouterr()
    assert encode(config)["encoded"] == 1
    result = cache(CacheConfig("verify", config.cache))[reader.fingerprint]
    assert (result["damaged"], result["waiting to be encoded anew"]) == ([], [])
    assert result["records"] == 24
    assert CacheReader(config.cache).content_digest() == whole


def test_info_shows_counts_and_the_fingerprint_in_words(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = encode(config)
    capsys.readouterr()
    result = cache(CacheConfig("info", config.cache))[summary["fingerprint"]]
    assert (result["records"], result["tiles"], result["bytes"]) == (24, summary["tiles"], summary["bytes"])
    assert list(result["images named, by source"].values()) == [25]
    printed = capsys.readouterr().out
    assert "vision.cut: 2" in printed
    assert "tile_size: 42" in printed
    with pytest.raises(CacheError, match="no feature cache"):
        cache(CacheConfig("info", config.cache / "nothing"))


def test_a_model_directory_brings_its_tower_and_its_slicing(config: EncodeConfig, tiny_model_dir: Path) -> None:
    encode(config)
    summary = encode(with_options(config, vision=str(tiny_model_dir), max_tiles=None))
    assert (summary["encoded"], summary["already_cached"]) == (0, 26)
    other = encode(with_options(config, vision=str(tiny_model_dir), max_tiles=2))  # for `sft --max-tiles 2`
    assert other["encoded"] == 24


def test_the_next_batch_is_put_together_while_the_tower_computes(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass of the tower waits here for the batch after it: made by the same thread, it would never come."""
    from llama3v.feature_cache import encode as verb
    from llama3v.feature_cache.encoders.torch import TorchEncoder

    made: list[str] = []
    passes: list[bool] = []
    real_batches, real_encode = verb.make_batches, TorchEncoder.encode

    def batches(*arguments):
        for batch in real_batches(*arguments):
            made.append("batch")
            yield batch
        made.append("end")

    def waiting(encoder: TorchEncoder, tiles: np.ndarray) -> torch.Tensor:
        number = len(passes)  # 0: the check of the engine
        deadline = time.monotonic() + 20
        while number and len(made) <= number and time.monotonic() < deadline:
            time.sleep(0.001)
        passes.append(len(made) > number)
        return real_encode(encoder, tiles)

    monkeypatch.setattr(verb, "make_batches", batches)
    monkeypatch.setattr(TorchEncoder, "encode", waiting)
    assert encode(config)["encoded"] == IMAGES
    assert made[-1] == "end"
    assert len(passes) == len(made) > 10
    assert all(passes)


def test_an_interrupt_ends_a_pass_that_finds_everything_cached(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its search for a first batch to encode may be hours from its end."""
    from llama3v.data.sources.base import FileImage
    from llama3v.feature_cache.encode import EncodePass

    encode(config)
    folder = Path(config.data).parent
    read = []

    def endless(encoding: EncodePass):
        image = FileImage("00.png", folder)
        while True:
            read.append("image")
            if len(read) == 500:
                os.kill(os.getpid(), signal.SIGINT)
            yield "sample", image

    monkeypatch.setattr(EncodePass, "_images", endless)
    with pytest.raises(KeyboardInterrupt, match="run the same command"):
        encode(config)
    assert 500 <= len(read) < 100_000


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "auto"])
def test_engines_fill_one_cache_and_the_summary_names_them(config: EncodeConfig, engine: str) -> None:
    if engine != "auto":
        pytest.importorskip(engine, reason=f"{engine} is not installed")
    first = encode(with_options(config, limit=9))
    summary = encode(with_options(config, engine=engine))
    assert summary["fingerprint"] == first["fingerprint"]
    assert (summary["encoded"], summary["already_cached"]) == (16, 10)
    if engine != "auto":
        assert (summary["engine"], summary["device"], summary["precision"]) == (engine, "cpu", "fp32")
    assert summary["engine"] in ("torch", "openvino", "onnxruntime", "mlx")
    assert summary["opening_seconds"] > 0


def test_an_engine_that_is_not_installed_is_refused_before_anything_is_read(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama3v.feature_cache.encoders.choose._is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"pip install 'llama3v\[openvino\]'"):
        encode(with_options(config, engine="openvino", data="nowhere"))


@pytest.mark.slow  # it starts four processes, two of which load torch
def test_the_benchmark_runs_and_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.encode import Options, main

    main(Options(json=tmp_path / "encode.json", quick=True, rounds=1, photographs=2, engines=("torch",)))
    results = json.loads((tmp_path / "encode.json").read_text())
    assert {"machine", "versions", "commit", "command", "rows"} <= set(results)
    assert {tuple(entry) for entry in results["rows"]} == {("name", "ours", "peer", "ratio", "limit", "unit", "note")}
    names = " ".join(entry["name"] for entry in results["rows"])
    for part in ("usual loop", "torch, fp32", "torch, bf16", "pass with torch", "listing", "encode pass over"):
        assert part in names or (part in ("listing", "encode pass over") and sys.platform != "linux")


# Killed processes are forked from one that has imported torch and loaded the tower, which takes seconds.
# Each order on stdin: a crash point and 0, or "never" and a number of shards at which to kill.
FORKS = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from llama3v.config import EncodeConfig
from llama3v.feature_cache import encode as verb, writer
from llama3v.model import vision
torch.set_num_threads(1)  # OpenMP's threads would not survive the fork
config = EncodeConfig(data=sys.argv[1], vision=sys.argv[2], cache=Path(sys.argv[3]), max_tiles=4, batch_tiles=5)
tower = vision.load_tower(config.vision)
vision.load_tower = lambda *arguments, **options: tower
real = writer.CacheWriter.__init__
writer.CacheWriter.__init__ = lambda self, root, manifest, shard_bytes: real(self, root, manifest, 4000)  # 1-3 images
generator = random.Random(0)
for line in sys.stdin:
    crash_at, shards = line.split()
    child = os.fork()
    if child == 0:
        os.environ["LLAMA3V_CRASH_AT"] = crash_at
        verb.encode(config)
        os._exit(0)
    ended = 0
    while not ended and (crash_at != "never" or len(list(config.cache.glob("*/shards/*.idx"))) < int(shards)):
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    if not ended:
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, 0)
    print("exit", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_kills_at_any_moment_cost_little_and_a_rerun_completes(config: EncodeConfig, tmp_path: Path) -> None:
    encode(config)
    killed = with_options(config, cache=tmp_path / "killed")
    command = [sys.executable, "-c", FORKS, killed.data, killed.vision, str(killed.cache)]
    orders = ["manifest-renamed 0", "shard-half-written:2 0", "never 3", "shard-renamed:2 0", "never 5", "never 6"]
    orders += ["index-synced:2 0", "never 9", "journal-half-written 0"]
    done = subprocess.run(command, input="\n".join(orders), capture_output=True, text=True, check=True)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert len(codes) == len(orders)
    assert set(codes) <= {CRASH_EXIT_CODE, -signal.SIGKILL, 0}, done.stderr
    # a fast machine may be done before a kill comes, and then later starts find nothing left to write
    assert codes[:2] == [CRASH_EXIT_CODE] * 2, done.stderr
    assert len(codes) - codes.count(0) >= 3, done.stderr
    before = len(CacheReader(killed.cache))
    assert before > 0
    summary = encode(killed)
    assert summary["encoded"] == IMAGES - before
    whole, again = CacheReader(config.cache), CacheReader(killed.cache)
    assert whole.content_digest() == again.content_digest()
    digest = open_source(config.data).digest
    names = [f"{number:02}.png" for number in range(IMAGES)] + ["copy.png"]
    assert [whole.key_of(digest, name) for name in names] == [again.key_of(digest, name) for name in names]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_commits_what_is_complete_and_says_how_to_go_on(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    from llama3v.model.vision import SiglipTower

    real, passes = SiglipTower.trunk, []

    def interrupted(tower: SiglipTower, pixels: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        if len(passes) == CHECKS + 4:
            os.kill(os.getpid(), stop)
        return real(tower, pixels)

    monkeypatch.setattr(SiglipTower, "trunk", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"[1-9]\d* images of this run are encoded and committed; run the same"):
        encode(config)
    assert set(passes[1:]) == {5}  # every batch is full
    committed = len(CacheReader(config.cache))
    assert 0 < committed < 24
    monkeypatch.setattr(SiglipTower, "trunk", real)
    assert encode(config)["encoded"] == 24 - committed
