"""What the machine can do now: matrix products in fp32, bf16 and int8 through torch's oneDNN. Prints JSON.

The best of many short tries each, since the machine may be shared. Shapes are those of a prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

SECONDS = 0.6
SHAPES = ((912, 2048, 2048), (1024, 1024, 4096), (1824, 576, 3072))


def best_rate(step: Callable[[], object], num_operations: int) -> float:
    """Billions of operations per second of the best call."""
    step()
    best = float("inf")
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
    return num_operations / best / 1e9


def float_rate(dtype: torch.dtype) -> float:
    """The best over all shapes."""
    rates = []
    for rows, inner, columns in SHAPES:
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        rates.append(
            best_rate(lambda x=x, w=weight: torch.nn.functional.linear(x, w), 2 * rows * inner * columns)
        )
    return max(rates)


def int8_rate() -> float:
    """s8 x s8 and, with packed weights, u8 x s8 with dynamic quantisation: the best of all."""
    rates = []
    torch.backends.quantized.engine = "onednn"
    for rows, inner, columns in SHAPES:
        x = torch.randint(-100, 100, (rows, inner), dtype=torch.int8)
        weight = torch.randint(-100, 100, (inner, columns), dtype=torch.int8)
        packed = torch.ao.nn.quantized.dynamic.Linear(inner, columns)
        activations = torch.randn(rows, inner)
        num_operations = 2 * rows * inner * columns
        rates.append(best_rate(lambda x=x, w=weight: torch._int_mm(x, w), num_operations))
        rates.append(best_rate(lambda x=activations, linear=packed: linear(x), num_operations))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = {
        "fp32_gflops": float_rate(torch.float32),
        "bf16_gflops": float_rate(torch.bfloat16),
        "int8_gflops": int8_rate(),
    }
    print(json.dumps({name: round(rate, 1) for name, rate in rates.items()}))


if __name__ == "__main__":
    main()
