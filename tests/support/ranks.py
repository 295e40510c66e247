"""Run a function in several processes joined by gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """work(rank, *arguments) in `count` processes; what each returned. One that fails, fails."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (count, folder, work, arguments), nprocs=count)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
