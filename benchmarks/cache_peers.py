"""Other programs' ways to read the same records, for benchmarks/cache.py."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

PACKAGES = ("pylance", "webdataset")
MODULES = {"pylance": "lance", "webdataset": "webdataset"}
FAMILIES = ("pylance take", "pylance blobs", "webdataset")
"""Beginnings of the names of what `make` gives; of those with the same beginning the fastest counts."""
TAKEN_TOGETHER = (1, 8)
BLOBS_TOGETHER = (8, 32)
TAR_BYTES = 128 << 20
SHUFFLE_BUFFER = 32

Make = Callable[[int, tuple[int, int]], tuple[str, np.ndarray, Any]]
Read = Callable[[list[int]], "Iterator[torch.Tensor]"]
"""The records of these numbers, bf16 [n_tiles, tokens, width]; in this order, but for WebDataset, which has its own."""


def make(work: Path, shape: tuple[int, int], records: int, features: Make) -> dict[str, Read]:
    """Write the records in each peer's format; name -> how it reads them."""
    ways: dict[str, Read] = {}
    if importlib.util.find_spec(MODULES["pylance"]):
        ways |= _lance(work, shape, records, features)
    if importlib.util.find_spec(MODULES["webdataset"]):
        ways |= _webdataset(work, shape, records, features)
    return ways


def _tensor(data: Any, shape: tuple[int, int]) -> "torch.Tensor":
    """bf16 [n_tiles, tokens, width] of bytes that are in memory."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # memory that is not writable
        return torch.frombuffer(data, dtype=torch.bfloat16).view(-1, *shape)


def _lance(work: Path, shape: tuple[int, int], records: int, features: Make) -> dict[str, Read]:
    import lance
    import pyarrow as pa

    def write(path: Path, field: pa.Field, version: str | None) -> Any:
        schema = pa.schema([pa.field("key", pa.string()), field])

        def batches() -> Iterator[pa.RecordBatch]:
            for number in range(records):
                key, bits, _ = features(number, shape)
                yield pa.record_batch([[key], pa.array([bits.tobytes()], pa.large_binary())], schema=schema)

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        return lance.write_dataset(reader, str(path), data_storage_version=version)

    plain = write(work / "plain.lance", pa.field("features", pa.large_binary()), None)
    blob = pa.field("features", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    blobs = write(work / "blobs.lance", blob, "2.1")

    def take(count: int) -> Read:
        def read(order: list[int]) -> "Iterator[torch.Tensor]":
            for numbers in in_batches(order, count):
                for value in plain.take(numbers, columns=["features"])["features"]:
                    yield _tensor(value.as_buffer(), shape)

        return read

    def take_blobs(order: list[int]) -> "Iterator[torch.Tensor]":
        for numbers in in_batches(order, 32):
            for blob in blobs.take_blobs("features", indices=numbers):
                yield _tensor(blob.readall(), shape)

    def read_blobs(count: int) -> Read:
        def read(order: list[int]) -> "Iterator[torch.Tensor]":
            for numbers in in_batches(order, count):
                for _, data in blobs.read_blobs("features", indices=numbers, preserve_order=True):
                    yield _tensor(data, shape)

        return read

    return (
        {f"pylance take of {count}": take(count) for count in TAKEN_TOGETHER}
        | {"pylance blobs: take_blobs of 32": take_blobs}
        | {f"pylance blobs: read_blobs of {count}": read_blobs(count) for count in BLOBS_TOGETHER}
    )


def _webdataset(work: Path, shape: tuple[int, int], records: int, features: Make) -> dict[str, Read]:
    import webdataset as wds

    directory = work / "tars"
    directory.mkdir()
    with wds.ShardWriter(str(directory / "%05d.tar"), maxsize=TAR_BYTES, verbose=0) as sink:
        for number in range(records):
            key, bits, _ = features(number, shape)
            sink.write({"__key__": key, "bin": bits.tobytes()})
    urls = sorted(str(path) for path in directory.glob("*.tar"))

    def read(order: list[int]) -> "Iterator[torch.Tensor]":
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)
        for sample in dataset:
            yield _tensor(sample["bin"], shape)

    return {"webdataset, shuffled stream": read}


def in_batches(order: list[int], count: int) -> Iterator[list[int]]:
    """The numbers, so many at a time."""
    return (order[start : start + count] for start in range(0, len(order), count))
