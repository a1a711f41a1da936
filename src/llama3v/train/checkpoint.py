"""Checkpoints that survive kill -9 at any moment: a fresh directory, a digest of every file, `LATEST` last.

    checkpoints/
      step-00000200/
        weights.safetensors      the parameters that train, fp32
        optimizer.safetensors    "<parameter>|<state>" -> moment
        tensors/                 instead of the two where ranks share the model (parallel/sharded.py)
        state.json               where the run stands, what it depends on, digests of the files and of itself
      LATEST                     name of the newest complete checkpoint

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a directory with its final name is
complete. Loading verifies every byte and goes back to the checkpoint before where one is damaged.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llama3v.errors import CheckpointError
from llama3v.feature_cache.commit import crash_point
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.parallel.sharded import read_sharded, write_sharded
from llama3v.train.saved_tensors import (
    OPTIMIZER,
    WEIGHTS,
    flush,
    is_sharded,
    read_whole,
    restore_optimizer,
    restore_weights,
    write_whole,
)

STATE, LATEST = "state.json", "LATEST"
FORMAT = 1
CRASH_POINTS = (
    "checkpoint-begun",
    f"checkpoint-{WEIGHTS}",
    f"checkpoint-{OPTIMIZER}",  # "checkpoint-tensors" where they are sharded
    "checkpoint-written",
    "checkpoint-renamed",
    "checkpoint-latest",
)
"""Moments of a save at which fault tests end the process (see feature_cache/commit.py)."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified."""

    directory: Path
    state: dict[str, Any]

    def restore(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
    ) -> None:
        """Give what trains, and its optimizer, the tensors of the checkpoint. All ranks call it.

        Args:
            parameters: what trains, by name, on whatever device and sharded or not.
        """
        try:
            if self.state["sharded"]:
                weights, moments = read_sharded(self.directory, parameters, ranks or Ranks())
            else:
                weights, moments = read_whole(self.directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {self.directory} cannot be read ({error})") from error
        restore_weights(parameters, weights)
        restore_optimizer(optimizer, moments)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made on the first save.
        keep: newest ones that stay.
        readers: the ranks that call `load`, in step.
        writers: those that call `save`, in step, and from one thread each: all of them where the tensors are sharded.
    """

    def __init__(
        self, directory: Path, keep: int = 2, *, readers: Ranks | None = None, writers: Ranks | None = None
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.readers, self.writers = readers or Ranks(), writers or Ranks()

    def save(
        self, step: int, state: Mapping[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> Path:
        """Write one checkpoint; when this returns it is on the disk and `LATEST` names it.

        Raises:
            CheckpointError: the disk is full, or cannot be written. The checkpoint before is intact.
        """
        final = self.directory / f"step-{step:08d}"
        temporary = self.directory / f".writing-{final.name}"
        try:
            self.writers.on_main(lambda: self._begin(temporary))
            files, sharded = self._write_tensors(temporary, weights, optimizer)
            content = {**state, "format": FORMAT, "sharded": sharded, "files": files}
            self.writers.on_main(lambda: self._commit(temporary, final, content))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._cannot_write(error, final, weights, optimizer) from error
        return final

    def load(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Says which ones were damaged (they are set aside, not deleted).

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged.
        """
        damaged = []
        for directory in self.readers.on_main(self._candidates):
            found = self._damage(directory)
            if found is not None:
                damaged.append(directory)
                say(f"{found}; trying the checkpoint before it")
                continue
            if damaged:
                self.readers.on_main(lambda directory=directory: self._fall_back(damaged, directory))  # type: ignore[misc]
            return Checkpoint(directory, read_state(directory))
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({', '.join(d.name for d in damaged)}); "
                "restore one from a backup, or remove the directory to train from the start"
            )
        return None

    def _damage(self, directory: Path) -> str | None:
        """What is wrong with a checkpoint, as any of the ranks found it; each reads some of the files."""
        found = None
        try:
            verify(directory, self.readers.number, self.readers.count)
        except CheckpointError as error:
            found = str(error)
        return next((text for text in self.readers.gather(found) if text is not None), None)

    def _fall_back(self, damaged: list[Path], directory: Path) -> None:
        for bad in damaged:
            self._set_aside(bad)
        self._point_latest_to(directory)

    def _candidates(self) -> list[Path]:
        """The one that LATEST names, then the others from new to old."""
        found = sorted(self.directory.glob("step-*"), reverse=True)
        latest = None
        with suppress(OSError):
            latest = self.directory / (self.directory / LATEST).read_text(errors="replace").strip()
        if latest in found:
            found.remove(latest)
            found.insert(0, latest)
        return found

    def _begin(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".writing-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        crash_point("checkpoint-begun")

    def _write_tensors(
        self, temporary: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> tuple[dict[str, str], bool]:
        """Returns the digests of all files, and whether they are sharded."""
        sharded = any(is_sharded(tensor) for tensor in weights.values())
        if sharded:
            names = write_sharded(temporary, weights, optimizer, self.writers)
        else:
            names = write_whole(temporary, weights, optimizer)
        digests = self.writers.gather({name: file_digest(temporary / name) for name in names})
        return {name: digest for part in digests for name, digest in part.items()}, sharded

    def _commit(self, temporary: Path, final: Path, content: dict[str, Any]) -> None:
        content["digest"] = _digest_of(content)
        write_durably(temporary / STATE, json.dumps(content, indent=1))
        flush(temporary)
        crash_point("checkpoint-written")
        if final.exists():
            self._set_aside(final)
        temporary.rename(final)
        crash_point("checkpoint-renamed")
        flush(self.directory)
        self._point_latest_to(final)
        crash_point("checkpoint-latest")
        self._remove_old()

    def _point_latest_to(self, directory: Path) -> None:
        replace_durably(self.directory / LATEST, directory.name + "\n")

    def _remove_old(self) -> None:
        # Newest of those that count first; what was set aside as damaged or replaced goes with the old ones.
        whole = self._candidates()
        for directory in [*whole[self.keep :], *self.directory.glob("aside-*")]:
            shutil.rmtree(directory, ignore_errors=True)

    def _set_aside(self, directory: Path) -> None:
        target = directory.with_name("aside-" + directory.name)
        shutil.rmtree(target, ignore_errors=True)
        directory.rename(target)

    def _cannot_write(
        self, error: Exception, final: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor]
    ) -> CheckpointError:
        size = sum(t.numel() * t.element_size() for tensors in (weights, optimizer) for t in tensors.values())
        before = self._candidates()
        rest = f"the checkpoint before it ({before[0].name}) is intact" if before else "there is none before it"
        if _means_full(error):
            return CheckpointError(
                f"{final}: no space for a checkpoint of {size / 1e6:,.1f} MB; {rest}; "
                "free some space and run the same command to resume"
            )
        return CheckpointError(f"{final}: cannot be written ({error}); {rest}; mend that and run the same command")


@contextmanager
def told_when_full(directory: Path) -> Iterator[None]:
    """Turn a full disk, wherever it shows while a run writes to `directory`, into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _means_full(error):
            raise
        raise CheckpointError(
            f"{directory}: no space left ({error}); the checkpoints written so far are intact; free some space and run "
            "the same command to resume"
        ) from error


def _means_full(error: Exception) -> bool:
    # safetensors tells the system's error in words only
    return getattr(error, "errno", None) in _NO_SPACE or any(os.strerror(code) in str(error) for code in _NO_SPACE)


def read_state(directory: Path) -> dict[str, Any]:
    """A checkpoint's state.json, verified. Raises CheckpointError."""
    try:
        state = json.loads((directory / STATE).read_text())
        if not isinstance(state, dict) or state.pop("digest", None) != _digest_of(state):
            raise CheckpointError(f"checkpoint {directory}: {STATE} does not have the digest it was written with")
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {directory}: its format is {state['format']}, this program reads {FORMAT}"
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read ({error})") from error
    return {"sharded": False, **state}


def verify(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Read one checkpoint, or every `parts`-th of its files. Raises CheckpointError where a byte differs or a file lacks."""
    files = sorted(read_state(directory)["files"].items())
    for name, expected in files[part::parts]:
        try:
            found = file_digest(directory / name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {directory} cannot be read ({error})") from error
        if found != expected:
            raise CheckpointError(f"checkpoint {directory}: {name} has digest {found}, expected {expected}")


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(16 * 2**20):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Replace a small file at once: a reader sees the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.writing")
    write_durably(temporary, text)
    temporary.replace(path)
    flush(path.parent)


def _digest_of(state: Mapping[str, Any]) -> str:
    import xxhash

    # through JSON once, so that what was written and what is read back (tuples -> lists) have one form
    return xxhash.xxh3_128(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()
