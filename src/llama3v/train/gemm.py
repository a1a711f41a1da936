"""How fast this device multiplies matrices: what the meter holds a run's speed against."""

from time import perf_counter

import torch

ENOUGH_SECONDS = 0.005  # of one product: then starting it does not count
LARGEST = 8192  # side of a matrix; larger ones are no faster on any device of today, and take 400 MB and more
SMALLEST = 256
ROUNDS = 5


def gemm_rate(device: torch.device, *, bf16: bool) -> float:
    """Floating-point operations per second of a square matrix product: the best of a few.

    Takes some hundredths of a second. Under `bf16` in that precision, else as fp32 products are set up in this process.
    Draws nothing from torch's random state.
    """
    side, dtype = SMALLEST, torch.bfloat16 if bf16 else torch.float32
    seconds = _seconds(device, side, dtype, rounds=1)  # the first product of a process also starts the library
    while (seconds := _seconds(device, side, dtype, rounds=1)) < ENOUGH_SECONDS and side < LARGEST:
        side *= 2
    return 2 * side**3 / min(seconds, _seconds(device, side, dtype, rounds=ROUNDS))


@torch.no_grad()
def _seconds(device: torch.device, side: int, dtype: torch.dtype, rounds: int) -> float:
    """Of the fastest of some products."""
    generator = torch.Generator(device).manual_seed(0)  # random numbers: a GPU multiplies zeros faster
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    times = []
    for _ in range(rounds):
        _wait(device)
        begun = perf_counter()
        a @ a
        _wait(device)
        times.append(perf_counter() - begun)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
