"""What ``RadixTree`` does, in plain Python: SGLang's algorithm for its RadixCache, written anew and as short as it goes.

It is the specification that tests compare with, and what the benchmark measures against. So tokens are arrays and values
tensors, prefixes are compared by slices that double, and leaves that may be evicted are kept in a set, as SGLang does. It
differs from SGLang in one thing: where a sequence ends inside of a node, the half behind it does not count as used.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Tokens = Sequence[int]


class Node:
    """A node; the root has no parent, and one that was evicted has none either."""

    def __init__(self, parent: Node | None, tokens: array[int], values: Tensor, extra_key: str | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.values = values
        self.extra_key = extra_key
        self.children: dict[object, Node] = {}
        self.locks = 0
        self.own_locks = 0
        self.used = 0
        self.hits = 0


class Model:
    """See ``torch_jit_ops.RadixTree``."""

    def __init__(self, page_size: int = 1) -> None:
        self.page_size = page_size
        self.clock = 0
        self.reset()

    @property
    def total(self) -> int:
        return self.evictable + self.protected

    @property
    def nbytes(self) -> int:
        """Of tokens and values alone."""
        return sum(len(node.tokens) * node.tokens.itemsize + node.values.nbytes for node in self.nodes())

    def reset(self) -> None:
        self.root = Node(None, array("q"), torch.empty(0, dtype=torch.int64), None)
        self.leaves: set[Node] = set()
        self.evictable = 0
        self.protected = 0

    def match_prefix(self, tokens: Tokens, extra_key: str | None = None, lock: bool = False) -> tuple[Tensor, Node, int]:
        self.clock += 1
        path = list(self._walk(self._pages(tokens), extra_key))
        node = path[-1] if path else self.root
        values = torch.cat([each.values for each in path]) if path else self.root.values
        if lock:
            self.lock(node)
        return values, node, len(values)

    def insert(self, tokens: Tokens, values: Tensor, extra_key: str | None = None, counted: int = 0) -> int:
        self.clock += 1
        key = self._pages(tokens)
        node, length = self.root, 0
        for node in self._walk(key, extra_key):
            length += len(node.tokens)
            node.hits += length > counted
        if length < len(key):
            leaf = Node(node, key[length:], values[length : len(key)].to(torch.int64, copy=True), extra_key)
            leaf.used = self.clock
            leaf.hits = int(len(key) > counted)
            node.children[self._child_key(leaf.tokens, node, extra_key)] = leaf
            self.evictable += len(leaf.tokens)
            self._update_leaf(node)
            self._update_leaf(leaf)
        return length

    def evict(self, tokens: int, policy: str = "lru") -> Tensor:
        def priority(node: Node) -> tuple[int, int]:
            return (node.hits if policy == "lfu" else 0, node.used)  # no two leaves have the same

        heap = [(priority(leaf), id(leaf), leaf) for leaf in self.leaves]
        heapq.heapify(heap)
        freed = [torch.empty(0, dtype=torch.int64)]
        went = 0
        while went < tokens and heap:
            leaf = heapq.heappop(heap)[2]
            parent = leaf.parent
            assert parent is not None
            freed.append(leaf.values)
            went += len(leaf.tokens)
            self.evictable -= len(leaf.tokens)
            self.leaves.discard(leaf)
            del parent.children[self._child_key(leaf.tokens, parent, leaf.extra_key)]
            leaf.parent = None
            self._update_leaf(parent)
            if parent in self.leaves:
                heapq.heappush(heap, (priority(parent), id(parent), parent))
        return torch.cat(freed)

    def lock(self, node: Node) -> None:
        self._check(node)
        node.own_locks += 1
        while node.parent is not None:
            if node.locks == 0:
                self.evictable -= len(node.tokens)
                self.protected += len(node.tokens)
            node.locks += 1
            self._update_leaf(node)
            node = node.parent

    def unlock(self, node: Node) -> None:
        self._check(node)
        if node is self.root:
            return
        if node.own_locks == 0:
            raise ValueError("the node is not locked")
        node.own_locks -= 1
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.tokens)
                self.protected -= len(node.tokens)
            self._update_leaf(node)
            node = node.parent

    def path(self, node: Node) -> tuple[list[int], list[int]]:
        self._check(node)
        if node.parent is None:
            return [], []
        tokens, values = self.path(node.parent)
        return tokens + list(node.tokens), values + node.values.tolist()

    def nodes(self) -> Iterator[Node]:
        stack = list(reversed(self.root.children.values()))
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children.values())

    # --- inside -------------------------------------------------------------------------------------

    def _check(self, node: Node) -> None:
        if node is not self.root and node.parent is None:
            raise ValueError("the node is gone")

    def _pages(self, tokens: Tokens) -> array[int]:
        key = tokens if isinstance(tokens, array) else array("q", tokens)
        return key[: len(key) // self.page_size * self.page_size]

    def _child_key(self, tokens: array[int], parent: Node, extra_key: str | None, start: int = 0) -> object:
        page = tokens[start] if self.page_size == 1 else tuple(tokens[start : start + self.page_size])
        return (extra_key, page) if parent is self.root else page

    def _walk(self, key: array[int], extra_key: str | None) -> Iterator[Node]:
        """The nodes of the longest prefix, used now; the last one is split where the sequence leaves it."""
        node, at = self.root, 0
        while at < len(key):
            child = node.children.get(self._child_key(key, node, extra_key, at))
            if child is None:
                return
            same = self._common(child.tokens, key, at)
            is_split = same < len(child.tokens)
            if is_split:
                child = self._split(child, same)
            child.used = self.clock
            at += same
            yield child
            if is_split:
                return
            node = child

    def _common(self, label: array[int], key: array[int], start: int) -> int:
        size = min(len(label), len(key) - start)
        low, step = 0, 1
        while low < size:
            high = min(low + step, size)
            if label[low:high] != key[start + low : start + high]:
                while high - low > 1:
                    middle = (low + high) // 2
                    if label[low:middle] == key[start + low : start + middle]:
                        low = middle
                    else:
                        high = middle
                break
            low = high
            step *= 2
        return low // self.page_size * self.page_size

    def _split(self, lower: Node, at: int) -> Node:
        parent = lower.parent
        assert parent is not None
        upper = Node(parent, lower.tokens[:at], lower.values[:at].clone(), lower.extra_key)
        upper.locks, upper.used, upper.hits = lower.locks, lower.used, lower.hits
        parent.children[self._child_key(lower.tokens, parent, lower.extra_key)] = upper
        lower.parent = upper
        lower.tokens, lower.values = lower.tokens[at:], lower.values[at:].clone()
        upper.children[self._child_key(lower.tokens, upper, lower.extra_key)] = lower
        return upper

    def _update_leaf(self, node: Node) -> None:
        is_leaf = node.parent is not None and node.locks == 0 and not node.children
        (self.leaves.add if is_leaf else self.leaves.discard)(node)


class ByToken(Model):
    """Compares token by token, as SGLang did before it compared slices, and as one would at first."""

    def _common(self, label: array[int], key: array[int], start: int) -> int:
        same = 0
        for ours, theirs in zip(label, key[start : start + len(label)], strict=False):
            if ours != theirs:
                break
            same += 1
        return same // self.page_size * self.page_size
