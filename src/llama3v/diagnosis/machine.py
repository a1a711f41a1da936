"""What is there: processor, memory, accelerators, packages. Nothing is measured here."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USES = {
    "parquet": "parquet data sets (the_cauldron, FineVision)",
    "lora": "LoRA adapters, and frozen LLMs in int8 and nf4",
    "gguf": "LLMs out of GGUF files, export --format gguf",
    "llamacpp": "GGUF pairs through llama.cpp: the fastest answers on a CPU",
    "openvino": "the vision tower on Intel and AMD CPUs; export --format openvino",
    "onnxruntime": "the vision tower on any CPU; export --format onnx",
    "mlx": "Apple's GPUs",
    "serve": "llama3v serve: the API and the page",
    "ray": "encode --ray-workers",
    "score": "encode --score with the tokenizer of SigLIP 1",
    "captions": "CIDEr, BLEU, ROUGE-L and METEOR in eval",
    "duplicates": "eval --trained-data: near-duplicates of training pictures",
    "tensorboard": "curves in TensorBoard while training",
    "wandb": "curves in Weights & Biases while training",
    "trackio": "curves in Trackio while training",
    "api": "eval of models behind an endpoint",
}
"""Extra -> what it is for. Those without a line here are for developers of this package."""


@dataclass(frozen=True)
class Extra:
    """An optional part of this package. `missing`: requirements that are not met, in words."""

    name: str
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install 'llama3v[{self.name}]'"


def extras() -> list[Extra]:
    """Every extra of the installed package, with what it lacks here."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in importlib.metadata.requires("llama3v") or ()]
    found = []
    for name in USES:
        wanted = [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": name})]
        wanted = [r for r in wanted if not r.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        if wanted:  # none: not offered for this system
            found.append(Extra(name, tuple(filter(None, map(_lack, wanted)))))
    return found


def facts() -> dict[str, Any]:
    """The machine and its software in words and numbers (memory and disk in bytes)."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    total, available = memory()
    on_gpu = gpu_memory()
    flags = _processor_line("flags").split()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": _processor_line("model name") or platform.processor() or "unknown",
        "cores": cores,
        "threads": torch.get_num_threads(),
        "bf16_instructions": any(flag in flags for flag in ("amx_bf16", "avx512_bf16")),
        "memory": total,
        "memory_available": available,
        "gpu_memory": on_gpu[0] if on_gpu else None,
        "gpu_memory_available": on_gpu[1] if on_gpu else None,
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "accelerator": _accelerator(),
        "versions": {name: _version(name) for name in ("llama3v", "torch", "transformers")},
    }


def advice(found: dict[str, Any]) -> list[str]:
    """What on this machine is set up below what it could do."""
    lines = []
    if found["accelerator"] is None and shutil.which("nvidia-smi") is not None:
        lines.append(
            f"there is an NVIDIA GPU, but PyTorch {found['versions']['torch']} cannot use it: install a CUDA build "
            "(https://pytorch.org/get-started/locally/)"
        )
    if found["threads"] < found["cores"]:
        lines.append(
            f"PyTorch uses {found['threads']} of {found['cores']} cores: unset OMP_NUM_THREADS, or set it to {found['cores']}"
        )
    return lines


def memory(groups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(all, available) bytes of main memory that this process may use: the machine's, or a container's where that is less.

    Args:
        groups: where Linux shows the limits of the container.
    """
    total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path("/proc/meminfo")
    if path.is_file():
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for folder, file, taken in (
        (groups, "memory.max", "anon"),
        (groups / "memory", "memory.limit_in_bytes", "total_rss"),
    ):
        if (folder / file).is_file() and (limit := (folder / file).read_text().strip()) != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            total, available = min(total, int(limit)), min(available, int(limit) - int(counts[taken]))
    return total, max(available, 0)


def gpu_memory() -> tuple[int, int] | None:
    """(all, available) bytes of a GPU with memory of its own that PyTorch uses; None: there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total, free


def _accelerator() -> str | None:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU" if torch.backends.mps.is_available() else None


def _lack(requirement: Any) -> str | None:
    """What is wrong with a requirement here, in words; None where it is met."""
    found = _version(requirement.name)
    if found is None:
        return str(requirement.name)
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name}{requirement.specifier} (found {found})"
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_line(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
