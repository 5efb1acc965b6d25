"""Data-parallel helpers: a few single-threaded processes that average their gradients once per step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def add_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """The options that every training stage has."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--minutes", type=float, default=0.0, help="if given, also end after this time")
    parser.add_argument("--batch", type=int, default=32, help="scenes per worker and step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)


def launch(run: Callable[[int, argparse.Namespace], None], args: argparse.Namespace, scratch: Path) -> None:
    """Start `run(rank, args)` in every worker; they meet at a file in `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    args.rendezvous = (scratch / "rendezvous").resolve()
    args.rendezvous.unlink(missing_ok=True)
    mp.spawn(run, args=(args,), nprocs=args.workers)
    args.rendezvous.unlink(missing_ok=True)


def join(rank: int, args: argparse.Namespace) -> None:
    """Set up one worker process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers
    )


def make_optimizer(params: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )


def averaged_step(
    optimizer: torch.optim.AdamW, params: list[nn.Parameter], lr: float, scalars: list[float]
) -> list[float]:
    """Average gradients and `scalars` over the workers, clip, step; returns the averaged scalars."""
    flat = torch.cat([p.grad.flatten() for p in params] + [torch.tensor(scalars)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for p in params:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()
    nn.utils.clip_grad_norm_(params, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return flat[offset:].tolist()
