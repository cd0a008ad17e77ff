"""The arguments with which an op is tested and measured, declared beside the op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of an op. ``note`` says why it is there."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class SampleMaker:
    """Makes the tensors of samples: the same values for a seed on every device.

    Args:
        device: where the tensors are.
        dtype: of the tensors; one of the op's dtypes.
        seed: of the random numbers.
    """

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values times ``scale``; for an integer dtype uniform in [-100, 100]. ``dtype`` in place of the maker's."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            return torch.randint(-100, 101, shape, generator=self._generator).to(self.device, dtype)
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, dtype)

    def values(self, *values: float) -> Tensor:
        """A 1-D tensor of exactly these values."""
        return torch.tensor(values, dtype=torch.float64).to(self.device, self.dtype)
