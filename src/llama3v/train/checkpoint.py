"""Checkpoints that survive kill -9 at any moment: a fresh directory, a digest of every file, `LATEST` last.

    checkpoints/
      step-00000200/
        weights.safetensors      the parameters that train, fp32
        optimizer.safetensors    "<parameter>|<state>" -> moment
        state.json               where the run stands, what it depends on, digests of the two files and of itself
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3v.errors import CheckpointError
from llama3v.feature_cache.commit import crash_point

WEIGHTS, OPTIMIZER, STATE, LATEST = "weights.safetensors", "optimizer.safetensors", "state.json", "LATEST"
FORMAT = 1
CRASH_POINTS = (
    "checkpoint-begun",
    f"checkpoint-{WEIGHTS}",
    f"checkpoint-{OPTIMIZER}",
    "checkpoint-written",
    "checkpoint-renamed",
    "checkpoint-latest",
)
"""Moments of a save at which fault tests end the process (see feature_cache/commit.py)."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    directory: Path
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made on the first save.
        keep: newest ones that stay.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

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
            self._write(temporary, final, state, weights, optimizer)
            self._point_latest_to(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._cannot_write(error, final, weights, optimizer) from error
        crash_point("checkpoint-latest")
        self._remove_old()
        return final

    def load(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Says which ones were damaged (they are set aside, not deleted).

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged.
        """
        candidates = self._candidates()
        damaged = []
        for directory in candidates:
            try:
                checkpoint = read_checkpoint(directory)
            except CheckpointError as error:
                damaged.append(directory)
                say(f"{error}; trying the checkpoint before it")
                continue
            for bad in damaged:
                self._set_aside(bad)
            if damaged:
                self._point_latest_to(directory)
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({', '.join(d.name for d in damaged)}); "
                "restore one from a backup, or remove the directory to train from the start"
            )
        return None

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

    def _write(
        self,
        temporary: Path,
        final: Path,
        state: Mapping[str, Any],
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
    ) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".writing-*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        crash_point("checkpoint-begun")
        digests = {}
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
            save_file({key: _plain(tensor) for key, tensor in tensors.items()}, temporary / name)
            _flush(temporary / name)
            digests[name] = file_digest(temporary / name)
            crash_point(f"checkpoint-{name}")
        content = {**state, "format": FORMAT, "files": digests}
        content["digest"] = _digest_of(content)
        write_durably(temporary / STATE, json.dumps(content, indent=1))
        _flush(temporary)
        crash_point("checkpoint-written")
        if final.exists():
            self._set_aside(final)
        temporary.rename(final)
        crash_point("checkpoint-renamed")
        _flush(self.directory)

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


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify one checkpoint directory. Raises CheckpointError where a byte differs or a file lacks."""
    try:
        state = json.loads((directory / STATE).read_text())
        if not isinstance(state, dict) or state.pop("digest", None) != _digest_of(state):
            raise CheckpointError(f"checkpoint {directory}: {STATE} does not have the digest it was written with")
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {directory}: its format is {state['format']}, this program reads {FORMAT}"
            )
        for name, expected in state["files"].items():
            if (found := file_digest(directory / name)) != expected:
                raise CheckpointError(f"checkpoint {directory}: {name} has digest {found}, expected {expected}")
        weights, optimizer = load_file(directory / WEIGHTS), load_file(directory / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read ({error})") from error
    return Checkpoint(directory, state, weights, optimizer)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments by name of the parameter; the groups must carry `names` (see stages.apply)."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put moments written by `optimizer_tensors` back."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("|")
        by_name.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            # AdamW keeps its step counter on the CPU unless it is fused or capturable on a GPU
            optimizer.state[parameter] = {
                key: value if key == "step" and not group.get("fused") else value.to(parameter.device)
                for key, value in by_name.pop(name, {}).items()
            }
            if not optimizer.state[parameter]:
                del optimizer.state[parameter]
    if by_name:
        raise CheckpointError(f"the checkpoint has optimizer state of {next(iter(by_name))}, which does not train here")


def restore_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy the trained weights into the model's parameters of the same names."""
    if parameters.keys() != weights.keys():
        other = sorted(parameters.keys() ^ weights.keys())
        raise CheckpointError(
            f"the checkpoint trained other parameters than this run, e.g. {other[0]}; use another --out"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


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
    _flush(path.parent)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_of(state: Mapping[str, Any]) -> str:
    import xxhash

    # through JSON once, so that what was written and what is read back (tuples -> lists) have one form
    return xxhash.xxh3_128(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()
