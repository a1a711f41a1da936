"""A ring a fifth as large as the cache: training ends with the losses of training from all of the cache, whatever is
killed, and the disk never holds more than the bound and one shard."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training import log_of, losses, make_pictures, start

from llama3v.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
from llama3v.config import EncodeConfig, PretrainConfig
from llama3v.errors import CacheError
from llama3v.feature_cache import journal
from llama3v.feature_cache.commit import CRASH_EXIT_CODE
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.ring.files import RingPaths
from llama3v.train import features, run

pytestmark = pytest.mark.timeout(1200)

TILE = 84
PICTURES = 96
STEPS = 90  # of 5 pictures or so: between four and five epochs
PATIENCE = 500  # seconds; on an idle machine a run takes five
SHARE = 0.2  # of the cache that the ring may hold


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tower whose features are large beside what a shard takes for itself: 4.6 kB a tile."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    directory = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=TILE,
        patch_size=14,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    SiglipVisionModel(config).eval().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), PICTURES, side=TILE)


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory: pytest.TempPathFactory, data: Path, tower: Path) -> Path:
    root = tmp_path_factory.mktemp("cache")
    encode(EncodeConfig(data=str(data), vision=str(tower), cache=root, max_tiles=4))
    return root


@pytest.fixture(scope="module")
def bound(whole_cache: Path) -> int:
    return int(SHARE * sum(record.bytes for record in CacheReader(whole_cache).records()))


def options_of(data: Path, tower: Path, llm: Path, cache: Path, out: Path, **changes: Any) -> PretrainConfig:
    options: dict[str, Any] = {
        "data": (str(data),),
        "vision": str(tower),
        "llm": str(llm),
        "max_tiles": 4,
        "row_tokens": 128,
        "rows_per_step": 2,
        "steps": STEPS,
        "checkpoint_every": 1,
        "learning_rate": 1e-2,
        "validation": str(data),
        "validation_samples": 4,
        "validate_every": 20,
        **changes,
    }
    return PretrainConfig(cache=cache, out=out, **options)


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, data: Path, tower: Path, tiny_llm_dir: Path, whole_cache: Path
) -> Path:
    """The run that reads everything from a cache of everything."""
    out = tmp_path_factory.mktemp("plain") / "out"
    process = start("pretrain", options_of(data, tower, tiny_llm_dir, whole_cache, out))
    process.join()
    assert process.exitcode == 0, log_of(options_of(data, tower, tiny_llm_dir, whole_cache, out)).read_text()
    return out


class Ring:
    """A trainer's and its encoders' options, and the processes."""

    def __init__(self, directory: Path, data: Path, tower: Path, llm: Path, bound: int, **changes: Any) -> None:
        self.cache, self.bound = directory / "cache", bound
        self.paths = RingPaths(self.cache, "test")
        self.training = options_of(data, tower, llm, self.cache, directory / "out", ring="test", **changes)
        self.processes: list[Any] = []
        self.largest = 0

    def encoding(self, number: int = 0, bound: int | None = None) -> EncodeConfig:
        return EncodeConfig(
            cache=self.cache,
            follow="test",
            max_disk=f"{bound or self.bound}B",
            out=self.cache.parent / f"encoder-{number}",
            batch_tiles=16,
        )

    def train(self) -> Any:
        return self.start_training(self.training)

    def start_training(self, options: PretrainConfig) -> Any:
        return self._started(start("pretrain", options))

    def encode(self, number: int = 0, **environment: str) -> Any:
        return self._started(start("encode", self.encoding(number), environment))

    def _started(self, process: Any) -> Any:
        self.processes.append(process)
        return process

    def used(self) -> int:
        total = 0
        for path in self.paths.directory.glob("*/shards/*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measures the disk all the time, and leaves no process behind."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                self.largest = max(self.largest, self.used())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                process.join()

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.cache.parent.glob("*.log"))

    def steps_done(self) -> int:
        try:
            return json.loads((self.training.out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError):
            return 0

    def one_shard(self) -> int:
        """The most that one shard takes: its bytes, one record beyond, header and index."""
        return self.bound // 16 + 4 * 36 * 64 * 2 + 3 * 4096


@pytest.fixture
def ring(tmp_path: Path, data: Path, tower: Path, tiny_llm_dir: Path, bound: int) -> Ring:
    return Ring(tmp_path, data, tower, tiny_llm_dir, bound)


def finish(process: Any, ring: Ring) -> None:
    process.join(PATIENCE)
    assert process.exitcode == 0, ring.logs()


@pytest.mark.slow  # half a minute and more
def test_a_fifth_of_the_disk_gives_the_same_training(ring: Ring, plain: Path) -> None:
    with ring.watched():
        encoder, trainer = ring.encode(), ring.train()
        finish(trainer, ring)
        finish(encoder, ring)
    assert losses(ring.training.out) == losses(plain)
    assert (ring.training.out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert 0.5 * ring.bound < ring.largest <= ring.bound + ring.one_shard()
    assert ring.used() == 0
    summary = json.loads((ring.encoding().out / "summary.json").read_text())
    assert summary["encoded"] > PICTURES
    assert summary["largest_bytes"] <= ring.bound


@pytest.mark.slow  # starts processes for up to a minute
def test_killed_again_and_again_both_go_on_to_the_same_training(ring: Ring, plain: Path) -> None:
    chance, killed = random.Random(0), {"encoder": 0, "trainer": 0}
    with ring.watched():
        encoder, trainer = ring.encode(), ring.train()
        while ring.steps_done() < STEPS - 2 and sum(killed.values()) < 8:
            before, began = ring.steps_done(), time.monotonic()
            while ring.steps_done() < before + 2 and time.monotonic() - began < 30:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
            who = "encoder" if sum(killed.values()) % 2 == 0 else "trainer"
            victim = encoder if who == "encoder" else trainer
            if victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                killed[who] += victim.exitcode == -signal.SIGKILL
            if who == "encoder":
                encoder = ring.encode()
            else:
                trainer = ring.train()
        finish(trainer, ring)
        finish(encoder, ring)
    assert killed["encoder"] >= 2, killed
    assert killed["trainer"] >= 2, killed
    assert losses(ring.training.out) == losses(plain)
    assert ring.largest <= ring.bound + ring.one_shard()
    assert ring.used() == 0


@pytest.mark.slow  # starts processes for up to a minute
def test_killed_both_at_once_again_and_again_they_go_on_to_the_same_training(ring: Ring, plain: Path) -> None:
    chance, killed = random.Random(1), 0
    with ring.watched():
        encoder, trainer = ring.encode(), ring.train()
        while ring.steps_done() < STEPS - 2 and killed < 5:
            before, began = ring.steps_done(), time.monotonic()
            while ring.steps_done() < before + 2 and trainer.is_alive() and time.monotonic() - began < 30:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
            for victim in (encoder, trainer):
                if victim.is_alive():
                    os.kill(victim.pid, signal.SIGKILL)
            for victim in (encoder, trainer):
                victim.join()
            killed += {encoder.exitcode, trainer.exitcode} == {-signal.SIGKILL}
            trainer, encoder = (ring.train(), ring.encode()) if killed % 2 else (ring.encode(), ring.train())[::-1]
        finish(trainer, ring)
        finish(encoder, ring)
    assert killed >= 2
    assert losses(ring.training.out) == losses(plain)
    assert ring.largest <= ring.bound + ring.one_shard()
    assert ring.used() == 0


@pytest.mark.slow  # starts processes for up to a minute
def test_another_training_may_take_over_a_ring_whose_training_was_killed(ring: Ring, plain: Path) -> None:
    """In another codec, and so with other features, while the encoder of the first is still at work."""
    first = replace(ring.training, out=ring.training.out.with_name("first"), codec="int8")
    with ring.watched():
        encoder, trainer = ring.encode(), ring.start_training(first)
        metrics = first.out / "metrics.jsonl"
        while trainer.is_alive() and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.join()
        finish(ring.train(), ring)
        finish(encoder, ring)
    assert len(list(ring.paths.directory.glob("*/manifest.json"))) == 2
    assert losses(ring.training.out) == losses(plain)
    assert ring.largest <= ring.bound + ring.one_shard()
    assert ring.used() == 0


CRASHES = (
    "shard-half-written:2",
    "shard-renamed:2",
    "index-half-written:2",
    "index-renamed:2",
    "prune-index-removed",
    "prune-shard-removed:2",
    "journal-half-written",
)


@pytest.mark.slow  # starts processes for up to a minute
def test_encoders_that_die_at_every_point_of_a_commit_and_of_a_removal_lose_nothing(ring: Ring, plain: Path) -> None:
    died = []
    with ring.watched():
        trainer = ring.train()
        for point in CRASHES:
            if not trainer.is_alive():
                break
            encoder = ring.encode(LLAMA3V_CRASH_AT=point)
            while encoder.is_alive() and trainer.is_alive():
                encoder.join(0.05)
            if encoder.exitcode == CRASH_EXIT_CODE:
                died.append(point)
        if trainer.is_alive():
            ring.encode()
        finish(trainer, ring)
    assert set(died) >= set(CRASHES[:5]), died  # the journal is written where an image is broken, so not here
    assert losses(ring.training.out) == losses(plain)
    assert ring.largest <= ring.bound + ring.one_shard()


@pytest.mark.slow  # starts processes for up to a minute
def test_several_encoders_share_the_work(ring: Ring, plain: Path) -> None:
    with ring.watched():
        encoders = [ring.encode(number) for number in (1, 2)]
        while not all(ring.encoding(number).out.with_suffix(".log").exists() for number in (1, 2)):
            time.sleep(0.05)
        finish(ring.train(), ring)
        for encoder in encoders:
            finish(encoder, ring)
    assert losses(ring.training.out) == losses(plain)
    assert ring.largest <= ring.bound + ring.one_shard()
    encoded = [json.loads((ring.encoding(number).out / "summary.json").read_text())["encoded"] for number in (1, 2)]
    assert min(encoded) > 0
    assert sum(encoded) < 1.3 * 5 * PICTURES  # an epoch once each


@pytest.mark.slow  # starts processes for up to a minute
def test_a_flipped_bit_in_a_ring_is_encoded_anew(ring: Ring, plain: Path) -> None:
    with ring.watched():
        encoder, trainer = ring.encode(), ring.train()
        while trainer.is_alive() and ring.steps_done() < 2:
            time.sleep(0.005)
        os.kill(trainer.pid, signal.SIGSTOP)
        time.sleep(1)  # what is read by now is read
        os.kill(encoder.pid, signal.SIGSTOP)
        flipped = [flip_last_byte(path) for path in ring.paths.directory.glob("*/shards/*.safetensors")]
        os.kill(encoder.pid, signal.SIGCONT)
        os.kill(trainer.pid, signal.SIGCONT)
        finish(trainer, ring)
        finish(encoder, ring)
    assert len(flipped) > 3
    [damaged] = ring.paths.directory.glob("*/damaged.jsonl")
    assert 0 < len(list(journal.read(damaged))) <= len(flipped)
    assert losses(ring.training.out) == losses(plain)


def flip_last_byte(path: Path) -> Path:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return path


@pytest.mark.slow  # starts processes for up to a minute
def test_a_stop_while_it_waits_is_obeyed_at_once_on_both_sides(ring: Ring, plain: Path) -> None:
    with ring.watched():
        trainer = ring.train()
        while "waiting for the encoder" not in ring.logs():
            time.sleep(0.05)
        os.kill(trainer.pid, signal.SIGTERM)
        trainer.join(PATIENCE)
        assert trainer.exitcode == 128 + signal.SIGTERM, ring.logs()
        encoder = ring.encode()
        while not list(ring.paths.directory.glob("*/shards/*.idx")):
            time.sleep(0.02)
        os.kill(encoder.pid, signal.SIGTERM)
        encoder.join(PATIENCE)
        assert encoder.exitcode == EXIT_INTERRUPTED, ring.logs()
        encoder, trainer = ring.encode(), ring.train()
        finish(trainer, ring)
        finish(encoder, ring)
    assert losses(ring.training.out) == losses(plain)


@pytest.mark.slow  # starts processes for up to a minute
def test_an_image_that_is_broken_behind_its_header_stops_the_training_until_it_is_mended(
    ring: Ring, plain: Path, data: Path
) -> None:
    image = data.parent / "images" / "50.png"
    whole = image.read_bytes()
    with ring.watched():
        try:
            image.write_bytes(whole[: len(whole) * 2 // 3])
            encoder, trainer = ring.encode(), ring.train()
            trainer.join(PATIENCE)
            assert trainer.exitcode == EXIT_USER_ERROR
            assert "image images/50.png of" in ring.logs()
            assert "put the right file in its place" in ring.logs()
        finally:
            image.write_bytes(whole)
        finish(ring.train(), ring)
        finish(encoder, ring)
    assert losses(ring.training.out) == losses(plain)


@pytest.mark.slow  # starts processes for up to a minute
def test_without_an_encoder_the_training_ends_with_the_command_to_start(
    ring: Ring, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features.ring, "PATIENCE_SECONDS", 0.2)
    with pytest.raises(CacheError, match=r"start `llama3v encode --follow test --cache .* --max-disk 200GB`"):
        run.pretrain(ring.training, console=Console(file=io.StringIO()))
    with ring.watched():
        encoder, trainer = ring.encode(), ring.train()
        finish(trainer, ring)
        finish(encoder, ring)
    assert losses(ring.training.out) == losses(plain)


@pytest.mark.slow  # starts processes for up to a minute
def test_a_bound_that_cannot_work_ends_the_encoder_with_one_that_does(ring: Ring) -> None:
    ring.bound = 60_000
    with ring.watched():
        ring.train()
        encoder = ring.encode()
        encoder.join(PATIENCE)
    assert encoder.exitcode == EXIT_USER_ERROR
    assert "that cannot be freed: give --max-disk" in ring.logs()
