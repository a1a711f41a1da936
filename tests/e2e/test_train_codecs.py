"""Training reads whichever codec the cache has: from `encode --codec` to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training import losses, make_pictures

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.reader import CacheReader
from llama3v.train import run


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123


def test_both_stages_train_on_the_codec_that_is_there_and_on_the_one_that_is_named(
    tmp_path: Path, tiny_vision_dir: Path, tiny_llm_dir: Path
) -> None:
    data, cache = make_pictures(tmp_path / "pictures", count=8), tmp_path / "cache"
    to_encode = {"data": str(data), "vision": str(tiny_vision_dir), "cache": cache, "max_tiles": 4}
    summary = encode(EncodeConfig(**to_encode, codec="int8"))
    assert (summary["codec"], summary["encoded"]) == ("int8", 8)
    assert {record.dtype for record in CacheReader(cache).records()} == {"int8"}

    common: dict[str, Any] = {"data": (str(data),), "cache": cache, "row_tokens": 128, "rows_per_step": 2, "steps": 3}
    first = common | {"vision": str(tiny_vision_dir), "llm": str(tiny_llm_dir), "max_tiles": 4}
    run.pretrain(PretrainConfig(out=tmp_path / "int8", **first), console=quiet())
    run.sft(SftConfig(out=tmp_path / "stage2", model=str(tmp_path / "int8"), **common), console=quiet())

    assert encode(EncodeConfig(**to_encode))["encoded"] == 8  # bf16 is another cache
    with pytest.raises(CacheError, match=r"holds these features in 2 codecs \(bf16, int8\); .*--codec"):
        run.pretrain(PretrainConfig(out=tmp_path / "unnamed", **first), console=quiet())
    for codec in ("int8", "bf16"):
        run.pretrain(PretrainConfig(out=tmp_path / f"named-{codec}", codec=codec, **first), console=quiet())
    assert losses(tmp_path / "named-int8") == losses(tmp_path / "int8")
    assert losses(tmp_path / "named-bf16") != losses(tmp_path / "int8")
    assert losses(tmp_path / "named-bf16")[-1][1] == pytest.approx(losses(tmp_path / "int8")[-1][1], rel=1e-2)


def test_the_command_for_missing_images_names_the_caches_codec(
    tmp_path: Path, tiny_vision_dir: Path, tiny_llm_dir: Path
) -> None:
    data, other = make_pictures(tmp_path / "pictures", count=2), make_pictures(tmp_path / "other", count=3)
    for picture in other.parent.glob("images/*"):
        picture.write_bytes(picture.read_bytes() + b"0")
    encode(EncodeConfig(data=str(data), vision=str(tiny_vision_dir), cache=tmp_path / "cache", codec="fp8"))
    config = PretrainConfig(
        data=(str(other),),
        cache=tmp_path / "cache",
        out=tmp_path / "out",
        vision=str(tiny_vision_dir),
        llm=str(tiny_llm_dir),
    )
    with pytest.raises(CacheError, match=r"run: llama3v encode --data .*train\.json .* --codec fp8$"):
        run.pretrain(config, console=quiet())
