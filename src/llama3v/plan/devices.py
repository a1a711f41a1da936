"""What well-known GPUs can do and cost: dense bf16 peak, memory, and a price. A snapshot, to compare by; imports no torch.

Peaks and memory: the makers' data sheets, without sparsity. Prices: one vendor's on-demand price each, from the SkyPilot
catalogue v8 and vendors' pages of 2026 (Verda, Verda, RunPod, Vast); what you pay is `--dollars-per-hour`.
"""

from dataclasses import dataclass

ASSUMED_MFU = 0.40
"""Share of a GPU's peak that training is assumed to use, until a run has measured it."""


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        peak: floating-point operations per second, dense bf16. memory: bytes. dollars: per GPU-hour.
    """

    name: str
    peak: float
    memory: int
    dollars: float


DEVICES = (
    Device("H100 80GB", 989e12, 80 * 10**9, 2.29),
    Device("A100 80GB", 312e12, 80 * 10**9, 1.29),
    Device("L40S 48GB", 362e12, 48 * 10**9, 0.79),
    Device("RTX 4090 24GB", 165e12, 24 * 10**9, 0.40),
)
