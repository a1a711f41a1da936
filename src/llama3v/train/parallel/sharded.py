"""Tensors of a checkpoint to which every rank writes its part: torch's distributed checkpoints (DCP).

    tensors/__0_0.distcp, __1_0.distcp, ...   a file of each rank
            .metadata                         which part of which tensor lies where

Read at any number of ranks, or in one process: each takes the parts it needs.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama3v.errors import CheckpointError
from llama3v.feature_cache.commit import crash_point
from llama3v.train.parallel.ranks import Ranks
from llama3v.train.saved_tensors import flush, other_parameters

FOLDER = "tensors"


def write_sharded(
    directory: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], ranks: Ranks
) -> list[str]:
    """Write this rank's part onto the disk; returns the names of the files that it wrote. All ranks call it.

    Raises OSError, on every rank, where one could not write.
    """
    import torch.distributed.checkpoint as dcp

    folder = directory / FOLDER
    content = {f"weights/{name}": tensor for name, tensor in weights.items()}
    content |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    try:
        dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), process_group=ranks.group)
    except dcp.CheckpointException as error:  # not an Exception; it carries those of all ranks
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(str(causes[0]))) from error
    own = sorted(folder.glob(f"__{ranks.number}_*"))
    if ranks.is_main:
        own.append(folder / ".metadata")
        flush(folder)
    crash_point("checkpoint-tensors")
    return [str(path.relative_to(directory)) for path in own]


def read_sharded(
    directory: Path, parameters: Mapping[str, Tensor], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments, each held as the parameter that it belongs to. All ranks call it.

    Raises CheckpointError where other parameters were trained.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(directory / FOLDER)
    content: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        kind, _, name = key.partition("/")
        owner = name if kind == "weights" else name.rpartition("|")[0]
        if owner not in parameters:
            raise other_parameters([owner])
        size, dtype = stored.size, stored.properties.dtype  # type: ignore[union-attr]
        like = parameters[owner].detach()
        of_that_shape = size == like.shape
        content[key] = torch.empty_like(like, dtype=dtype) if of_that_shape else torch.empty(size, dtype=dtype)
    try:
        dcp.load(content, storage_reader=reader, no_dist=ranks.alone)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read ({error})") from error
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    for key, tensor in content.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    return parts["weights"], parts["optimizer"]
