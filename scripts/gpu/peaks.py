"""Peak rates of GPUs, from NVIDIA's datasheets: dense fp16 with fp32 accumulation, and memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One kind of GPU."""

    tflops: float
    terabytes_per_second: float
    source: str


# By a part of the name that nvidia-smi gives; the first that fits.
PEAKS: dict[str, Peak] = {
    "H200": Peak(989.4, 4.8, "H200 datasheet, SXM"),
    "H100 PCIe": Peak(756.0, 2.0, "H100 datasheet, PCIe"),
    "H100 NVL": Peak(835.0, 3.9, "H100 datasheet, NVL"),
    "H100": Peak(989.4, 3.35, "H100 datasheet, SXM"),
    "A100-PCIE-40GB": Peak(312.0, 1.555, "A100 datasheet, 40 GB"),
    "A100": Peak(312.0, 2.039, "A100 datasheet, 80 GB SXM"),
    "L40S": Peak(362.05, 0.864, "L40S datasheet"),
    "L4": Peak(121.0, 0.3, "L4 datasheet"),
    "A10": Peak(125.0, 0.6, "A10 datasheet"),
    "RTX 4090": Peak(165.2, 1.008, "Ada architecture whitepaper"),
    "RTX 3090": Peak(71.0, 0.936, "Ampere GA102 whitepaper"),
    "T4": Peak(65.0, 0.32, "T4 datasheet"),
}


def peak_of(name: str) -> Peak | None:
    """The peak of the GPU that nvidia-smi calls `name`."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
