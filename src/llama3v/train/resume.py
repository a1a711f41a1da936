"""What a run depends on, in words: so that a resumed run is the same run, or is refused with the difference."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from llama3v import __version__
from llama3v.config import TrainConfig
from llama3v.errors import CheckpointError, RankError
from llama3v.train.parallel.ranks import Ranks

# Options that may change between two parts of a run: they say where things lie, what is measured and how the work is
# cut up, not what is computed. (rows_per_pass changes the last bits of a sum, and nothing else; so may another mode.)
FREE = frozenset(
    {
        *(
            "recipe",
            "dry_run",
            "out",
            "cache",
            "dollars_per_hour",
            "checkpoint_every",
            "keep_checkpoints",
            "max_bad_ratio",
        ),
        *("rows_per_pass", "validation", "validate_every", "validation_samples", "mode", "ring"),
        *("parallel", "rank_timeout", "activation_checkpointing"),
        *("budget", "preemption_hours", "sample_every", "stop_on_alarm", "trackers", "too_long", "attention"),
    }
)
# Options whose effect is compared instead: names of things that carry a digest, and what decides the number of steps.
COMPARED_BY_EFFECT = frozenset({"data", "limit", "vision", "llm", "model", "cut", "codec", "steps", "epochs"})


def trajectory_options(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the losses and that nothing else in the identity stands for."""
    return {name: value for name, value in plain(config).items() if name not in FREE | COMPARED_BY_EFFECT}


def plain(config: TrainConfig) -> dict[str, Any]:
    """A config as JSON can hold it."""
    return json.loads(json.dumps(asdict(config), default=str))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for every field in which two nested mappings differ."""
    found = []
    for field in sorted({*before, *now}):
        old, new = before.get(field), now.get(field)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{field}.")
        elif old != new:
            found.append(f"{prefix}{field} was {old}, now {new}")
    return found


def refuse_drift(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise CheckpointError where the run in `out` and this one would not compute the same."""
    if found := differences(before, now):
        raise CheckpointError(
            f"{out} holds a run that this one would not continue: {'; '.join(found)}. "
            "Run the command it was started with, or choose another --out"
        )


def refuse_unequal(ranks: Ranks, now: Mapping[str, Any]) -> None:
    """Raise RankError, on every rank, where one of them would not compute the same as rank 0."""
    first, *others = ranks.gather(now)
    for number, other in enumerate(others, start=1):
        if found := differences(first, other):
            words = "; ".join(found).replace(" was ", " is ").replace(", now ", f" on process 0, on process {number} ")
            raise RankError(f"the processes of this run are not alike: {words}; give all of them the same files")


def weights_digest(model: nn.Module) -> str:
    """xxh3_128 over all names and weights of a model."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        data = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """xxh3_128 over all a fast tokenizer is made of."""
    return xxhash.xxh3_128(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Versions and machine: what may move the last bits of a result."""
    import transformers

    return {
        "llama3v": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }
