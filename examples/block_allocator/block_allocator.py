"""A C++ class with a state, compiled on first use: the allocator of a paged KV cache.

python examples/block_allocator/block_allocator.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from torch_jit_ops import OpLibrary


class BlockAllocator(Protocol):
    """Hands out the blocks of a paged KV cache, each to one sequence or, with ``share``, to several."""

    def allocate(self, count: int) -> list[int]:
        """Blocks that nobody has. Raises RuntimeError if there are not so many."""

    def share(self, blocks: Sequence[int]) -> None:
        """One more sequence has these."""

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence less has these; a block that nobody has any more is free."""

    @property
    def free(self) -> int:
        """How many nobody has."""


class Native(Protocol):
    """What the module has, for type checkers: they cannot look into C++."""

    def BlockAllocator(self, blocks: int) -> BlockAllocator: ...


library = OpLibrary("paging", csrc=Path(__file__).parent)
native = cast(Native, library.module("block_allocator", sources="block_allocator.cpp"))


def main() -> None:
    allocator = native.BlockAllocator(8)  # compiled here
    prompt = allocator.allocate(3)
    allocator.share(prompt)  # a second sequence begins with the same prompt
    allocator.release(prompt)
    print(f"taken {prompt}, {allocator.free} of 8 blocks are free")


if __name__ == "__main__":
    main()
