"""SGLang's own RadixCache, called as its scheduler does, with the calls of ``RadixTree``. SGLang must be importable."""

from __future__ import annotations

import sys
from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from torch import Tensor


class SGLang:
    """Tokens are ``array("q")``, as its scheduler has them; values int64."""

    def __init__(self, page_size: int = 1) -> None:
        self.page_size = page_size
        self.cache = RadixCache.create_simulated(mock_allocator=self, page_size=page_size)
        self.lock, self.unlock = self.cache.lock, self.cache.unlock

    def match_prefix(self, tokens: array[int]) -> tuple[Tensor, Any, int]:
        found = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
        return self.cache.path_device_indices(found.last_device_node), found.last_device_node, found.device_prefix_len

    def insert(self, tokens: array[int], values: Tensor) -> int:
        key = RadixKey(tokens).page_aligned(self.page_size)
        copied = values[: len(key)].to(dtype=torch.int64, copy=True)  # as its _insert_cache does
        return int(self.cache.insert(InsertParams(key=key, value=copied)).prefix_len)

    def evict(self, tokens: int) -> Tensor:
        self.freed = [torch.empty(0, dtype=torch.int64)]
        self.cache.evict(EvictParams(num_tokens=tokens))
        return torch.cat(self.freed)

    @property
    def total(self) -> int:
        return int(self.cache.total_size())

    @property
    def nbytes(self) -> int:
        """Of tokens and values, and of the objects around them as far as ``sys.getsizeof`` knows: not what a tensor takes."""
        size, stack = 0, [self.cache.root_node]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node is not self.cache.root_node:
                parts = (node, vars(node), node.children, node.key, node.key.token_ids, node.value)
                size += sum(map(sys.getsizeof, parts)) + node.value.nbytes
        return size

    # --- what it takes for its allocator --------------------------------------------------------------

    device = "cpu"

    def free_segment(self, values: Tensor, *, start_pos: int) -> None:
        self.freed.append(values)
