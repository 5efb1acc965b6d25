"""Peak rates of GPUs, from NVIDIA's datasheets: dense fp16 with fp32 accumulation, and memory bandwidth."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One kind of GPU."""

    tflops: float
    terabytes_per_second: float
    source: str


# By the name that nvidia-smi gives, less the maker's: a whole match, so that an L40 is not taken for an L4.
# Datasheets that give only the rate with sparsity: half of it.
PEAKS: dict[str, Peak] = {
    r"H200( SXM.*)?": Peak(989.4, 4.8, "H200 datasheet, SXM"),
    r"H200 NVL": Peak(835.5, 4.8, "H200 datasheet, NVL"),
    r"H100 PCIe": Peak(756.0, 2.0, "H100 datasheet, PCIe"),
    r"H100 NVL": Peak(835.5, 3.9, "H100 datasheet, NVL"),
    r"H100( SXM.*| 80GB HBM3)?": Peak(989.4, 3.35, "H100 datasheet, SXM"),
    r"A100-(SXM4|PCIE)-40GB": Peak(312.0, 1.555, "A100 datasheet, 40 GB"),
    r"A100-SXM4-80GB": Peak(312.0, 2.039, "A100 datasheet, 80 GB SXM"),
    r"A100[- ](PCIE-80GB|80GB PCIe)": Peak(312.0, 1.935, "A100 datasheet, 80 GB PCIe"),
    r"L40S": Peak(362.05, 0.864, "L40S datasheet"),
    r"L40": Peak(181.05, 0.864, "L40 datasheet"),
    r"L4": Peak(121.0, 0.3, "L4 datasheet"),
    r"A10": Peak(125.0, 0.6, "A10 datasheet"),
    r"RTX 4090": Peak(165.2, 1.008, "Ada architecture whitepaper"),
    r"RTX 3090": Peak(71.0, 0.936, "Ampere GA102 whitepaper"),
    r"(Tesla )?T4": Peak(65.0, 0.32, "T4 datasheet"),
}


def peak_of(name: str) -> Peak | None:
    """The peak of the GPU that nvidia-smi calls `name`; None for one that is not in the table."""
    short = re.sub(r"^(NVIDIA )?(GeForce )?", "", name.strip())
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, short)), None)
