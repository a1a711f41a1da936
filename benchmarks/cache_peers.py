"""Other programs' ways to read the same records, for benchmarks/cache.py."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("pylance", "webdataset")
MODULES = {"pylance": "lance", "webdataset": "webdataset"}
WAYS = ("pylance take of", "pylance take_blobs", "webdataset")
"""Beginnings of the names of the sides that `make` gives; of those with the same beginning the fastest counts."""
LANCE_BATCHES = (1, 8, 32)
TAR_BYTES = 128 << 20
SHUFFLE_BUFFER = 32

Make = Callable[[int, tuple[int, int]], tuple[str, np.ndarray, Any]]


def make(
    work: Path, shape: tuple[int, int], records: int, features: Make, orders: list[list[int]]
) -> dict[str, Callable[[], None]]:
    """Write the records in each peer's format; name -> a function that reads them all in `orders[0]`."""
    sides: dict[str, Callable[[], None]] = {}
    if importlib.util.find_spec(MODULES["pylance"]):
        sides |= _lance(work, shape, records, features, orders)
    if importlib.util.find_spec(MODULES["webdataset"]):
        sides |= _webdataset(work, shape, records, features)
    return sides


def _tensor(data: Any, shape: tuple[int, int]) -> Any:
    """bf16 [n_tiles, tokens, width] of bytes that are in memory."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # memory that is not writable
        return torch.frombuffer(data, dtype=torch.bfloat16).view(-1, *shape)


def _lance(
    work: Path, shape: tuple[int, int], records: int, features: Make, orders: list[list[int]]
) -> dict[str, Callable[[], None]]:
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

    def take(count: int) -> Callable[[], None]:
        def read() -> None:
            order = orders[0]
            for start in range(0, records, count):
                column = plain.take(order[start : start + count], columns=["features"])["features"]
                for value in column:
                    _tensor(value.as_buffer(), shape)

        return read

    def take_blobs() -> None:
        order = orders[0]
        for start in range(0, records, 32):
            for blob in blobs.take_blobs("features", indices=order[start : start + 32]):
                _tensor(blob.readall(), shape)

    return {f"pylance take of {count}": take(count) for count in LANCE_BATCHES} | {
        "pylance take_blobs of 32": take_blobs
    }


def _webdataset(work: Path, shape: tuple[int, int], records: int, features: Make) -> dict[str, Callable[[], None]]:
    import webdataset as wds

    directory = work / "tars"
    directory.mkdir()
    with wds.ShardWriter(str(directory / "%05d.tar"), maxsize=TAR_BYTES, verbose=0) as sink:
        for number in range(records):
            key, bits, _ = features(number, shape)
            sink.write({"__key__": key, "bin": bits.tobytes()})
    urls = sorted(str(path) for path in directory.glob("*.tar"))

    def read() -> None:
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)
        count = 0
        for sample in dataset:
            _tensor(sample["bin"], shape)
            count += 1
        assert count == records, f"webdataset gave {count} of {records} records"

    return {"webdataset shuffled stream": read}
