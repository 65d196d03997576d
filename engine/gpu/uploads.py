"""Small arrays on their way to a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copy without waiting for the device: an ordinary copy would wait for every step that is queued."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
