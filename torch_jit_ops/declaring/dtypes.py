"""Which dtypes an op has kernels for, argument by argument, and the combinations in which its samples come.

dtypes=(torch.float16, torch.bfloat16)                                          all tensors have the one or the other
dtypes={"q": (torch.bfloat16,), "positions": (torch.int32, torch.int64)}        each argument by itself: 1 times 2
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from torch_jit_ops.declaring import variant

Given = Sequence[torch.dtype] | Mapping[str, Sequence[torch.dtype]]


@dataclass(frozen=True)
class Combination:
    """The dtypes of the tensors of a sample.

    Attributes:
        first: that of the argument which is named first, or the one of all tensors.
        named: arguments with their dtypes.
        is_shared: the declaration gives one dtype for all, and names no argument.
    """

    first: torch.dtype
    named: tuple[tuple[str, torch.dtype], ...] = ()
    is_shared: bool = True

    def distinct(self) -> list[torch.dtype]:
        """Each dtype once, as ``build`` and ``check`` take them."""
        return list(dict.fromkeys([self.first, *(dtype for _, dtype in self.named)]))

    def __str__(self) -> str:
        if self.is_shared:
            return shown([self.first])
        return ",".join(f"{name}={shown([dtype])}" for name, dtype in self.named)


class DTypes(Mapping[str, tuple[torch.dtype, ...]]):
    """Argument by argument, the dtypes that have kernels.

    Args:
        named: the arguments that the declaration names; of a tuple, those whose dtype picks the kernel.
        shared: the tuple, if the declaration gives one for all arguments.
    """

    def __init__(self, named: Mapping[str, tuple[torch.dtype, ...]], shared: tuple[torch.dtype, ...] | None = None) -> None:
        self._named = dict(named)
        self.shared = shared

    def __getitem__(self, argument: str) -> tuple[torch.dtype, ...]:
        return self._named[argument]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __repr__(self) -> str:
        return f"DTypes({self})"

    def __str__(self) -> str:
        if self.shared is not None:
            return shown(self.shared)
        return "; ".join(f"{name}: {shown(dtypes)}" for name, dtypes in self.items())

    def of(self, argument: str) -> tuple[torch.dtype, ...]:
        """The dtypes with kernels of an argument; of one that is not named, those that are shared."""
        return self._named.get(argument, self.shared or ())

    def combinations(self, only: Given | None = None) -> list[Combination]:
        """What samples come in: every dtype that is shared, or the product of those of the arguments.

        Args:
            only: fewer dtypes. Of a list, each argument takes those that it has; one that has none of them keeps its own.

        Raises:
            ValueError: there is no kernel for one that ``only`` asks for.
        """
        chosen = self._chosen(only)
        if self.shared is not None:
            return [Combination(dtype, tuple((name, dtype) for name in self)) for dtype in chosen[""]]
        products = itertools.product(*(chosen[name] for name in self))
        return [Combination(each[0], tuple(zip(self, each, strict=True)), is_shared=False) for each in products]

    def _chosen(self, only: Given | None) -> dict[str, tuple[torch.dtype, ...]]:
        groups = {"": self.shared} if self.shared is not None else self._named
        if only is None:
            return groups
        if isinstance(only, Mapping):
            if self.shared is not None:
                raise ValueError(f"all arguments have the same dtypes, {self}; got some for {', '.join(only)}")
            for name, dtypes in only.items():
                if name not in groups or not set(dtypes) <= set(groups[name]):
                    raise ValueError(f"there are kernels for {self}; got {name}: {shown(dtypes)}")
            return {name: tuple(only.get(name, dtypes)) for name, dtypes in groups.items()}
        for dtype in only:
            if not any(dtype in dtypes for dtypes in groups.values()):
                raise ValueError(f"there are kernels for {self}; got {shown(only)}")
        return {name: _among(dtypes, only) or dtypes for name, dtypes in groups.items()}


def _among(dtypes: Sequence[torch.dtype], only: Collection[torch.dtype]) -> tuple[torch.dtype, ...]:
    return tuple(dtype for dtype in dtypes if dtype in only)


def parse(who: str, given: Given, tensors: Sequence[str], picking: Sequence[str]) -> DTypes:
    """What a declaration says about dtypes.

    Args:
        who: the op.
        given: a tuple for all arguments, or a mapping from arguments.
        tensors: names of the tensor arguments.
        picking: those whose dtype picks the kernel.

    Raises:
        TypeError: something in it is no dtype.
        ValueError: kernels have no such type, or an argument is named that is no tensor, or one is not that picks the kernel.
    """
    if not isinstance(given, Mapping):
        _check(who, "dtypes", given)
        return DTypes(dict.fromkeys(picking, tuple(given)), tuple(given))
    if not given:
        raise ValueError(f"{who}: dtypes is empty; name a tensor argument, or give a tuple for all of them")
    for name, dtypes in given.items():
        if name not in tensors:
            raise ValueError(f"{who}: dtypes names {name!r}; its tensor arguments are {', '.join(tensors) or 'none'}")
        _check(who, f"dtypes of {name!r}", dtypes)
        if not dtypes:
            raise ValueError(f"{who}: dtypes of {name!r} is empty; it needs one dtype at least")
    for name in picking:
        if name not in given:
            raise ValueError(
                f"{who}: the dtype of {name!r} picks the kernel, but dtypes does not name it; it names {', '.join(given)}"
            )
    return DTypes({name: tuple(dtypes) for name, dtypes in given.items()})


def _check(who: str, option: str, dtypes: Sequence[torch.dtype]) -> None:
    if isinstance(dtypes, (str, bytes)) or not isinstance(dtypes, Sequence):
        raise TypeError(f"{who}: {option} must be a list, got {dtypes!r}")
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{who}: {option} must hold dtypes of torch, got {dtype!r}")
        try:
            variant.cpp_name(dtype)
        except ValueError as error:
            raise ValueError(f"{who}: {option}: {error}") from error


def shown(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes for a person: ``float16, bfloat16``."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
