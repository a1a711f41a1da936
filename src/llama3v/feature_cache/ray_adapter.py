"""The encode pass on a Ray cluster: the same engine and the same writer, in actors of Ray Data.

    one task lists the data set -> actors read, decode, encode and commit a chunk of samples at a time -> counts

An actor answers for a chunk only once its records are committed, so a chunk whose actor died is simply done again by
another: what it had committed is found and not encoded twice. Actors need no coordination beside the cache directory,
which all machines of the cluster share under one path, as they do the data set.
"""

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from llama3v import errors
from llama3v.config import EncodeConfig
from llama3v.data.ledger import Ledger
from llama3v.data.sources import Rejected, Sample, Source, open_source
from llama3v.errors import ConfigError, Llama3VError
from llama3v.feature_cache.encode import EARLIEST_STOP, Counts, EncodePass, encode, finish, open_pass, out_of
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.progress import EncodeProgress

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES_IN_CHUNK = 128
"""Samples that an actor is given at a time, and commits before the next: with one tile each, 215 MB of features."""


def encode_with_ray(config: EncodeConfig) -> dict[str, Any]:
    """`encode`, shared by `config.ray_workers` actors.

    Uses the Ray that the process is connected to, else the cluster that RAY_ADDRESS names, else a local one. Each actor
    gets an equal share of the cluster's CPUs and, where there are any, one GPU.

    Returns:
        The summary, as `encode` does. `encoded` counts an image twice where two actors met it at the same time; the
        cache holds one logical record of it.

    Raises:
        ConfigError: Ray Data is not installed, or the cluster has too few CPUs.
        Llama3VError: what an actor raised, as `encode` would.
    """
    source = open_source(config.data, config.limit)
    total, summaries, started = Counts(), _Summaries(), time.perf_counter()
    progress = EncodeProgress(total, source.name, None)
    ledger: Ledger | None = None
    with progress:
        for result in _results(config):
            _raise_what_an_actor_raised(result)
            summaries.add(result["summary"])
            _add(total, result["counts"])
            if ledger is None:
                ledger = Ledger(
                    out_of(config, CachePaths(config.cache, summaries.fingerprint), source) / "ledger.jsonl"
                )
            for entry in result["left_out"]:
                ledger.leave_out(**entry)
            if total.images + total.left_out_rows >= EARLIEST_STOP:
                ledger.check_ratio(total.images + total.left_out_rows, config.max_bad_ratio)
            progress.update()
    if ledger is None:  # not one sample
        return encode(replace(config, ray_workers=0))
    ledger.check_ratio(total.images + total.left_out_rows, config.max_bad_ratio)
    return finish(config, source, summaries.joined(total, config.ray_workers, time.perf_counter() - started))


class _Summaries:
    """The summaries of chunks, joined to one."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._engine: dict[str, Any] = {}
        self._set_aside: dict[str, str] = {}
        self._bytes = 0

    @property
    def fingerprint(self) -> str:
        return self._last["fingerprint"]

    def add(self, summary: dict[str, Any]) -> None:
        self._last = summary
        self._bytes += summary["bytes"]
        self._set_aside |= summary["shards_set_aside"]
        if summary["engine"]:
            self._engine = {name: summary[name] for name in ("engine", "device", "precision")}

    def joined(self, total: Counts, workers: int, seconds: float) -> dict[str, Any]:
        """The counts, and rates over the time of the whole, with what Ray took to start."""
        waiting = max(0.0, 1 - total.tower_seconds / (workers * seconds)) if total.tiles else 0.0
        rates = {
            "seconds": seconds,
            "images_per_second": total.images / seconds,
            "tiles_per_second": total.tiles / seconds,
            "wait_share": waiting,
        }
        found = {"bytes": self._bytes, "shards_set_aside": self._set_aside, "ray_workers": workers}
        return self._last | self._engine | asdict(total) | rates | found


def _results(config: EncodeConfig) -> Iterator[dict[str, Any]]:
    """What the actors answer, chunk by chunk, as they come."""
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 0)) // config.ray_workers
    if cpus < 1:
        raise ConfigError(
            f"--ray-workers is {config.ray_workers} and the cluster has {resources.get('CPU', 0):g} CPUs; "
            "give at most as many workers"
        )

    samples = SAMPLES_IN_CHUNK

    def list_samples(_: "pa.Table") -> "Iterator[pa.Table]":  # runs on some machine of the cluster
        yield from _chunks(open_source(config.data, config.limit), samples, with_turns=config.score)

    with _one_row_is_one_block(ray):
        chunks = ray.data.from_items([0]).map_batches(list_samples, batch_format="pyarrow", num_cpus=0)
        answers = chunks.map_batches(
            _Actor,
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=config.ray_workers),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=1 if resources.get("GPU") else None,
        )
        for row in answers.iter_rows():
            yield pickle.loads(row["answer"])


def _chunks(source: Source, samples: int, with_turns: bool) -> "Iterator[pa.Table]":
    """Tables of one row: a chunk of the source's rows. An image that is a file travels as its name."""
    import pyarrow as pa

    rows = iter(source)
    while chunk := list(islice(rows, samples)):
        if not with_turns:
            chunk = [replace(row, turns=()) if isinstance(row, Sample) else row for row in chunk]
        yield pa.table({"rows": pa.array([pickle.dumps(chunk)], pa.binary())})


class _Actor:
    """Encodes chunks with one tower and one writer."""

    def __init__(self, config: EncodeConfig) -> None:
        source = open_source(config.data)
        self.config, self.digest, self.name = config, source.digest, source.name
        self.encoding: EncodePass | None = None

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        answers = [pickle.dumps(self._encode(pickle.loads(rows.as_py()))) for rows in batch["rows"]]
        return pa.table({"answer": pa.array(answers, pa.binary())})

    def _encode(self, rows: list[Sample | Rejected]) -> dict[str, Any]:
        ledger = _Collected()
        try:
            if self.encoding is None:
                self.encoding = open_pass(self.config, _Rows(self.name, self.digest, rows), ledger)
                self.encoding.progress = EncodeProgress(Counts(), self.name, None, hidden=True)
            encoding, before = self.encoding, self.encoding.writer.committed_bytes
            encoding.source, encoding.ledger, encoding.counts = _Rows(self.name, self.digest, rows), ledger, Counts()
            encoding.run()
            summary = encoding.summary()
            summary["bytes"] -= before
            return {"summary": summary, "counts": asdict(encoding.counts), "left_out": ledger.entries}
        except Llama3VError as error:
            return {"error": type(error).__name__, "message": str(error)}


class _Rows:
    """A chunk of a source, as a source."""

    def __init__(self, name: str, digest: str, rows: list[Sample | Rejected]) -> None:
        self.name, self.digest, self._rows = name, digest, rows

    def __iter__(self) -> Iterator[Sample | Rejected]:
        return iter(self._rows)


class _Collected(Ledger):
    """A ledger in memory, whose lines are written elsewhere, where the share of what is left out is judged too."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def leave_out(self, id: str, reason: str, **detail: Any) -> None:
        self.entries.append({"id": id, "reason": reason, **detail})

    def check_ratio(self, total: int, max_bad_ratio: float) -> None:
        pass


def _add(total: Counts, counts: dict[str, Any]) -> None:
    for field in fields(Counts):
        setattr(total, field.name, getattr(total, field.name) + counts[field.name])


def _raise_what_an_actor_raised(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"--ray-workers needs Ray Data, which cannot be imported ({error}); install the extra: "
            "pip install 'llama3v[ray]'"
        ) from error
    return ray


@contextmanager
def _one_row_is_one_block(ray: Any) -> Iterator[None]:
    """So that chunks spread over the actors instead of being gathered for one. Our own progress line suffices."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = 1, False
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
