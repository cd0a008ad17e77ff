"""The arguments with which an op is tested and measured, declared beside the op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring.dtypes import Combination


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Attributes:
        note: why it is there.
        has_tokens: the first dimension of its first tensor counts tokens, of which there may be others. Not so where it is a
            cache, whose places indices name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    has_tokens: bool = True


class SampleMaker:
    """Makes the tensors of samples: the same values for a seed on every device.

    Args:
        device: where the tensors are.
        dtypes: one of the op's combinations of dtypes, or one dtype for all.
        seed: of the random numbers.

    Attributes:
        dtype: of the argument that the declaration names first, or of all.
        dtypes: by argument, such as ``make.dtypes["positions"]``.
    """

    def __init__(self, device: str | torch.device, dtypes: torch.dtype | Combination, seed: int = 0) -> None:
        combination = Combination(dtypes) if isinstance(dtypes, torch.dtype) else dtypes
        self.device = torch.device(device)
        self.dtype = combination.first
        self.dtypes: Mapping[str, torch.dtype] = dict(combination.named)
        self._generator = torch.Generator().manual_seed(seed)
        self._indices: list[Tensor] = []

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values times ``scale``; ``dtype`` in place of the maker's.

        Of an 8-bit float none that overflow; of scales in e8m0, which holds powers of two alone, those from 1/16 to 16. Of an
        integer dtype they are uniform in [-100, 100], of one without a sign in [0, 100].
        """
        dtype = dtype or self.dtype
        if dtype is torch.bool:
            return self.booleans(*shape)
        if dtype is torch.float8_e8m0fnu:
            made = torch.exp2(torch.randint(-4, 5, shape, generator=self._generator).float())
        elif not dtype.is_floating_point:
            made = torch.randint(max(-100, torch.iinfo(dtype).min), 101, shape, generator=self._generator)
        else:
            made = torch.randn(shape, generator=self._generator) * scale
            if dtype.itemsize == 1:
                # What becomes of a value that is too large depends on PyTorch's version and on the device.
                made = made.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        return self._placed(made.to(dtype))

    def values(self, *values: float, dtype: torch.dtype | None = None) -> Tensor:
        """A 1-D tensor of exactly these values."""
        return self._placed(torch.tensor(values, dtype=torch.float64).to(dtype or self.dtype))

    def booleans(self, *shape: int, chance: float = 0.5) -> Tensor:
        """True with this chance."""
        return self._placed(torch.rand(shape, generator=self._generator) < chance)

    def indices(self, count: int, *, below: int, unique: bool = False, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers from 0 to ``below - 1``, both of them among two or more. Tests that try extreme values leave them alone.

        Args:
            count: how many.
            below: the number of places that they may name.
            unique: none twice, as slots that are written need.
            dtype: such as ``make.dtypes["indices"]``.

        Raises:
            ValueError: there are not as many that are unique.
        """
        if count > below and (unique or below == 0):
            raise ValueError(f"there are {below} indices below {below}, fewer than {count}")
        if unique:
            made = torch.randperm(below, generator=self._generator)[:count]
        else:
            made = torch.randint(below or 1, (count,), generator=self._generator)
        ends = [end for end in (below - 1, 0)[:count] if count > 1]
        for place, end in enumerate(dict.fromkeys(ends)):
            if unique and (made == end).any():  # it comes here in exchange for what was here
                made[made == end] = made[place].clone()
            made[place] = end
        return self.kept(self._placed(made.to(dtype)))

    def positions(self, tokens: int, *, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """The place of each token in its sequence, in no order, as in a batch of many: from 0 to ``below - 1``."""
        return self.indices(tokens, below=below, dtype=dtype)

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor, whose values tests do not replace by extreme ones: for offsets and lengths of the author's own making."""
        self._indices.append(tensor)
        return tensor

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether the tensor is one of indices, or a part of one."""
        return any(tensor.untyped_storage()._cdata == index.untyped_storage()._cdata for index in self._indices)

    def _placed(self, made: Tensor) -> Tensor:
        """Converted before it gets there: devices round alike, but what overflows they treat as they like."""
        return made.to(self.device)
