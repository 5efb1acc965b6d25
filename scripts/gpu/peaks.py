"""Peak rates of GPUs, from their makers' datasheets: dense fp16 with fp32 accumulation, and memory bandwidth.

The table is the one that `recaption plan` has: src/plan/gpus.json.
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parents[2] / "src" / "plan" / "gpus.json"


@dataclass(frozen=True)
class Peak:
    """One kind of GPU."""

    tflops: float
    terabytes_per_second: float
    source: str


def peak_of(name: str) -> Peak | None:
    """The peak of the GPU that nvidia-smi calls `name`; None for one that is not in the table."""
    short = re.sub(r"^(NVIDIA )?(GeForce )?", "", name.strip())
    for gpu in json.loads(TABLE.read_text()):
        # Whole names, less the maker's, so that an L40 is not taken for an L4; some end in a star.
        if any(fnmatch.fnmatchcase(short, pattern) for pattern in gpu["names"]):
            return Peak(gpu["fp16_tflops"], gpu["terabytes_per_second"], gpu["source"])
    return None
