"""Where the time of a step goes on the GPU, by kind of kernel."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.rate import wait

KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "matmul"),
    "optimizer and clipping": ("multi_tensor",),
    "copies": ("memcpy", "memset"),
    "compiled element-wise": ("triton",),
}
"""Kind -> what a kernel's name has in it, the first kind that fits; all others are "element-wise, norms and the rest"."""
REST = "element-wise, norms and the rest"


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def where_time_goes(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What `_profiled` finds; `error` where the profiler does not work here, which must not lose the other figures."""
    try:
        return _profiled(step, device)
    except RuntimeError as error:
        return {"shares": {}, "longest": [], "error": str(error).strip().splitlines()[0]}


def _profiled(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Shares of one step's time by kind of kernel, "idle" included, and the five longest kernels.

    On a CPU, where there are no kernels to tell apart, operations are told by their names instead.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        wait(device)
        begun = perf_counter()
        step()
        wait(device)
        elapsed = perf_counter() - begun
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[event.key] = seconds.get(event.key, 0.0) + took / 1e6
    shares: dict[str, float] = {}
    for name, took in seconds.items():
        shares[kind_of(name)] = shares.get(kind_of(name), 0.0) + took / elapsed
    shares["idle"] = max(0.0, 1 - sum(shares.values()))
    longest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:5]
    return {
        "shares": {kind: round(share, 4) for kind, share in shares.items()},
        "longest": [{"kernel": name[:100], "share": round(seconds[name] / elapsed, 4)} for name in longest],
    }
