"""How fast the GPU is: matrix products in bf16, measured; and what its datasheet says."""

from time import perf_counter

import torch

DATASHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's datasheets, by a part of the device's name; the first that fits."""


def datasheet_rate() -> float | None:
    """Of this GPU, or None where it is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in DATASHEET.items() if all(word in name for word in part.split())), None)


def product_rate(rows: int, inputs: int, outputs: int, device: torch.device, seconds: float) -> float:
    """FLOP/s of [rows, inputs] @ [inputs, outputs] in bf16, sustained for about so many seconds.

    Sustained, because a GPU that is hot and at its power limit is slower than in its first milliseconds.
    """
    a = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    b = torch.randn(inputs, outputs, device=device, dtype=torch.bfloat16)
    out = torch.empty(rows, outputs, device=device, dtype=torch.bfloat16)
    count, elapsed = 1, 0.0
    while elapsed < seconds:  # doubled until it takes that long; only the last run counts
        count *= 2
        wait(device)
        begun = perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        wait(device)
        elapsed = perf_counter() - begun
    return 2.0 * rows * inputs * outputs * count / elapsed


def wait(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
