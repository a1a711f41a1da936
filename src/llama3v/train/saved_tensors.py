"""The tensors of a checkpoint, by name: the weights that train, and the optimizer's moments of each.

A checkpoint holds them whole in two safetensors files, or, where the ranks have only parts of each, in a file per rank
(parallel/sharded.py). Either kind can be read into either placement: this is what makes a run elastic.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama3v.errors import CheckpointError
from llama3v.feature_cache.commit import crash_point

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


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
                key: value if key == "step" and not group.get("fused") else _held_as(value, parameter)
                for key, value in by_name.pop(name, {}).items()
            }
            if not optimizer.state[parameter]:
                del optimizer.state[parameter]
    if by_name:
        raise CheckpointError(f"the checkpoint has optimizer state of {next(iter(by_name))}, which does not train here")


def restore_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy the trained weights into the model's parameters of the same names."""
    if parameters.keys() != weights.keys():
        raise other_parameters(parameters.keys() ^ weights.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_held_as(weights[name], parameter))


def other_parameters(names: Any) -> CheckpointError:
    """What is wrong where a checkpoint and a run do not train the same."""
    return CheckpointError(
        f"the checkpoint trained other parameters than this run, e.g. {min(names)}; use another --out"
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing them, which takes a while."""
    return hasattr(tensor, "device_mesh")


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, which can be written while training goes on. Sharded ones stay sharded."""
    return {name: _copy(tensor.detach()) for name, tensor in tensors.items()}


def write_whole(directory: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> list[str]:
    """Write both files onto the disk; returns their names."""
    for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, directory / name)
        flush(directory / name)
        crash_point(f"checkpoint-{name}")
    return [WEIGHTS, OPTIMIZER]


def read_whole(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments, as `write_whole` wrote them."""
    return load_file(directory / WEIGHTS), load_file(directory / OPTIMIZER)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _held_as(value: Tensor, parameter: Tensor) -> Tensor:
    """A stored tensor where the parameter's own lie: on its device, and this rank's part where it is sharded."""
    if not is_sharded(parameter) or is_sharded(value) or value.shape != parameter.shape:
        return value.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # no messages


def _copy(tensor: Tensor) -> Tensor:
    if not is_sharded(tensor):
        return tensor.to("cpu", copy=True)
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    own = tensor.to_local().to("cpu", copy=True)
    mesh = _host_mesh(tensor.device_mesh.size())
    return DTensor.from_local(own, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@cache
def _host_mesh(ranks: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (ranks,))
