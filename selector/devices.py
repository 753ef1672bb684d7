"""What differs between a CPU and a GPU, whose work is queued and done later."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Waits until the work queued on a GPU is done, without which a clock times the launch alone; elsewhere nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
