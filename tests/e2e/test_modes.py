"""Modes features, pixels and stream give the same training, and each says what it cannot do."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from training import losses, make_pictures

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.errors import CacheError, ConfigError, DataError
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.reader import CacheReader
from llama3v.model.tiles import decode_image, make_tiles
from llama3v.train import run
from llama3v.train.batches import RowPlan
from llama3v.train.prepared import load_prepared

CUT = 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one of them under two names, one lying on its side, and one row that names a text as its image."""
    path = make_pictures(tmp_path_factory.mktemp("pictures"))
    images, rows = path.parent / "images", json.loads(path.read_text())
    (images / "copy.png").write_bytes((images / "5.png").read_bytes())
    rows[9]["image"] = "images/copy.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "6.png").save(images / "6.jpg", exif=exif)
    rows[6]["image"] = "images/6.jpg"
    rows.append({**rows[0], "id": "broken", "image": "images/broken.png"})
    (images / "broken.png").write_text("<html>404</html>")
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_vision_dir: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("caches")
    for mode in ("features", "pixels"):
        encode(
            EncodeConfig(
                data=str(data),
                vision=str(tiny_vision_dir),
                cache=root / mode,
                cut=CUT if mode == "features" else None,
                max_tiles=4,
                max_bad_ratio=0.2,
                mode=mode,
            )
        )
    return {"features": root / "features", "pixels": root / "pixels"}


def options_of(data: Path, vision: Path, llm: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": (str(data),),
        "vision": str(vision),
        "llm": str(llm),
        "cut": CUT,
        "max_tiles": 4,
        "row_tokens": 128,
        "rows_per_step": 2,
        "rows_per_pass": 1,
        "steps": 12,
        "learning_rate": 1e-2,
        "max_bad_ratio": 0.2,
        "validation": str(data),
        "validate_every": 5,
        "checkpoint_every": 5,
        **changes,
    }


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    data: Path,
    caches: dict[str, Path],
    tiny_vision_dir: Path,
    tiny_llm_dir: Path,
) -> dict[str, Path]:
    """The same training in every mode."""
    outs = {}
    for mode in ("features", "pixels", "stream"):
        outs[mode] = tmp_path_factory.mktemp(mode)
        options = options_of(data, tiny_vision_dir, tiny_llm_dir, mode=mode, cache=caches.get(mode))
        run.pretrain(PretrainConfig(out=outs[mode], **options), console=quiet())
    return outs


@pytest.mark.parametrize("mode", ["pixels", "stream"])
def test_losses_and_weights_are_those_of_training_from_features_bit_for_bit(runs: dict[str, Path], mode: str) -> None:
    assert losses(runs[mode]) == losses(runs["features"])
    weights = [(runs[name] / "model.safetensors").read_bytes() for name in (mode, "features")]
    assert weights[0] == weights[1]
    summaries = [json.loads((runs[name] / "summary.json").read_text()) for name in (mode, "features")]
    for name in ("validation_loss_shuffled", "validation_gap", "left_out", "tiles", "samples"):
        assert summaries[0][name] == summaries[1][name], name
    assert summaries[0]["left_out"] == 1


def test_the_reason_of_an_unreadable_image_is_in_the_ledger_in_every_mode(runs: dict[str, Path]) -> None:
    for mode, reason in (
        ("features", "not in the cache"),
        ("pixels", "not in the cache"),
        ("stream", "cannot be read"),
    ):
        [entry] = [json.loads(line) for line in (runs[mode] / "ledger.jsonl").read_text().splitlines()]
        assert entry["id"] == "broken"
        assert reason in entry["reason"]
    assert "an HTML page" in entry["because"]


def test_a_cache_of_tiles_holds_the_tiles_and_serves_any_cut(
    caches: dict[str, Path], runs: dict[str, Path], data: Path
) -> None:
    cache = CacheReader(caches["pixels"])
    assert {record.dtype for record in cache.records()} == {"u8"}
    assert sorted(cache.manifest) == ["codec", "max_tiles", "slicing", "tile_size"]
    from llama3v.data.sources import Sample, open_source

    source, found = open_source(str(data)), 0
    for item in source:
        assert isinstance(item, Sample)
        [image] = item.images
        key = cache.key_of(source.digest, image.name)
        if key is not None:
            tiles = make_tiles(decode_image(image.read()), 42, 4).pixels
            assert torch.equal(cache.read(key), torch.from_numpy(tiles).flatten(1, 2))
            found += 1
    assert found == 16


def test_a_run_goes_on_in_another_mode(
    tmp_path: Path,
    runs: dict[str, Path],
    data: Path,
    caches: dict[str, Path],
    tiny_vision_dir: Path,
    tiny_llm_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(data, tiny_vision_dir, tiny_llm_dir)

    def fail_at(self: CacheReader, keys: Sequence[str]) -> Any:
        reads.extend(keys)
        if len(reads) >= 60:
            raise CacheError("the disk is gone")
        return real(self, keys)

    real, reads = CacheReader.read_many, list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "read_many", fail_at)
        with pytest.raises(CacheError, match="the disk is gone"):
            run.pretrain(PretrainConfig(out=tmp_path, cache=caches["features"], **options), console=quiet())
    run.pretrain(PretrainConfig(out=tmp_path, mode="stream", **options), console=quiet())
    assert losses(tmp_path) == losses(runs["features"])


def test_fine_tuning_streams_too(tmp_path: Path, runs: dict[str, Path], data: Path, caches: dict[str, Path]) -> None:
    options: dict[str, Any] = {"data": (str(data),), "model": str(runs["stream"]), "row_tokens": 128, "steps": 3}
    for mode in ("features", "stream"):
        config = SftConfig(
            out=tmp_path / mode, mode=mode, cache=caches.get(mode), policy="seed", max_bad_ratio=0.2, **options
        )
        run.sft(config, console=quiet())
    assert losses(tmp_path / "stream") == losses(tmp_path / "features")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_fine_tuning_from_a_ring_is_fine_tuning_from_the_whole_cache(
    tmp_path: Path, runs: dict[str, Path], data: Path, codec: Any
) -> None:
    model, cache = str(runs["stream"]), tmp_path / "cache"
    encode(EncodeConfig(data=str(data), vision=model, cache=cache, codec=codec, max_bad_ratio=0.2))
    options: dict[str, Any] = {"data": (str(data),), "model": model, "row_tokens": 128, "rows_per_step": 1}
    options |= {"steps": 20, "cache": cache, "codec": codec, "policy": "seed", "max_bad_ratio": 0.2}
    options |= {"checkpoint_every": 2, "validation": str(data), "validation_samples": 2, "validate_every": 7}
    run.sft(SftConfig(out=tmp_path / "plain", **options), console=quiet())

    summaries: list[dict[str, Any]] = []
    following = EncodeConfig(cache=cache, follow="ring", max_disk="60kB", out=tmp_path / "encoder")
    encoder = threading.Thread(target=lambda: summaries.append(encode(following)))
    encoder.start()
    run.sft(SftConfig(out=tmp_path / "out", ring="ring", **options), console=quiet())
    encoder.join()
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")
    [summary] = summaries
    assert summary["largest_bytes"] <= 60_000
    assert not list((cache / "rings" / "ring").glob("*/shards/*"))


def test_an_image_that_breaks_after_planning_stops_the_run_and_mended_it_goes_on(
    tmp_path: Path, tiny_vision_dir: Path, tiny_llm_dir: Path, data: Path
) -> None:
    """Its header is whole, so it is planned with; training reaches it after a checkpoint."""
    options = options_of(data, tiny_vision_dir, tiny_llm_dir, mode="stream", checkpoint_every=1)
    config = PretrainConfig(out=tmp_path / "out", **{**options, "validation": None})
    plain = PretrainConfig(out=tmp_path / "plain", **{**options, "validation": None})
    run.pretrain(plain, console=quiet())
    image = last_image_of_the_first_epoch(tmp_path / "plain", data)
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[: len(whole) * 2 // 3])
        for _ in range(2):  # again and again, until somebody does something
            with pytest.raises(
                DataError, match=rf"image images/{image.name} of .* broken or trunc.* --mode pixels --data"
            ):
                run.pretrain(config, console=quiet())
        assert list((tmp_path / "out" / "checkpoints").glob("step-*"))
        Image.new("RGB", (400, 20)).save(image)
        with pytest.raises(DataError, match="it is cut into 4x1 slices, planned"):
            run.pretrain(config, console=quiet())
    finally:
        image.write_bytes(whole)
    run.pretrain(config, console=quiet())
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")


def last_image_of_the_first_epoch(out: Path, data: Path) -> Path:
    directory = out / "prepared" / "training"
    prepared = load_prepared(directory, json.loads((directory / "prepared.json").read_text())["made_from"])
    assert prepared is not None
    rows = RowPlan(prepared.lengths.tolist(), 128, 2, 1, seed=0, tiles=prepared.tiles.tolist()).epoch(0)
    return data.parent / json.loads(data.read_text())[rows[-1][-1]]["image"]


def test_an_image_that_was_exchanged_is_not_trained_on(
    tmp_path: Path, data: Path, tiny_vision_dir: Path, tiny_llm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(data, tiny_vision_dir, tiny_llm_dir, mode="stream")
    image = data.parent / "images" / "3.png"
    whole, real = image.read_bytes(), run.set_modes

    def exchange(model: Any) -> None:
        image.write_bytes((data.parent / "images" / "2.png").read_bytes())
        real(model)

    monkeypatch.setattr(run, "set_modes", exchange)  # after planning, before the first step
    try:
        with pytest.raises(DataError, match="its bytes are others than those that were planned with"):
            run.pretrain(PretrainConfig(out=tmp_path, **options), console=quiet())
    finally:
        image.write_bytes(whole)


def test_options_that_do_not_go_together_are_refused() -> None:
    common: dict[str, Any] = {"data": ("a.json",), "out": Path("out"), "vision": "v", "llm": "l"}
    with pytest.raises(ConfigError, match="mode pixels needs a cache"):
        PretrainConfig(mode="pixels", **common)
    with pytest.raises(ConfigError, match="--codec has no meaning in mode stream"):
        PretrainConfig(mode="stream", codec="int8", **common)
    with pytest.raises(ConfigError, match="--codec int8 is for features"):
        EncodeConfig(data="a", vision="v", cache=Path("c"), mode="pixels", codec="int8")


def test_a_cache_of_features_is_no_cache_of_tiles(
    tmp_path: Path, data: Path, caches: dict[str, Path], tiny_vision_dir: Path, tiny_llm_dir: Path
) -> None:
    options = options_of(data, tiny_vision_dir, tiny_llm_dir, mode="pixels", cache=caches["features"])
    with pytest.raises(CacheError, match="has no features of this kind"):
        run.pretrain(PretrainConfig(out=tmp_path, **options), console=quiet())


def test_missing_tiles_are_an_error_with_the_command(
    tmp_path: Path, data: Path, caches: dict[str, Path], tiny_vision_dir: Path, tiny_llm_dir: Path
) -> None:
    other = make_pictures(tmp_path / "other", count=3)
    for number in range(3):
        Image.new("RGB", (50, 50 + number)).save(other.parent / f"images/{number}.png")
    options = options_of(other, tiny_vision_dir, tiny_llm_dir, mode="pixels", cache=caches["pixels"])
    with pytest.raises(CacheError, match=r"run: llama3v encode --data .*train\.json .* --mode pixels$"):
        run.pretrain(PretrainConfig(out=tmp_path / "out", **{**options, "validation": None}), console=quiet())
