"""RadixTree: a prefix cache in C++, which finds the slots of a KV cache that hold the keys and values of a prompt's beginning.

    tree = torch_jit_ops.RadixTree(page_size=16)
    slots, node, length = tree.match_prefix(prompt, lock=True)      length tokens need no prefill
    ...                                                             prefill and decode into slots of one's own
    known = tree.insert(tokens, all_slots)                          all_slots[length:known] are there twice: free them
    tree.unlock(node)
    free(tree.evict(1000))                                          when slots run short

It does what SGLang's RadixCache does (python/sglang/srt/mem_cache/radix_cache.py); bench/radix_model.py says it in Python.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, NewType, NoReturn, Protocol

import torch
from torch import Tensor

from torch_jit_ops import forks
from torch_jit_ops.ops.library import library

if TYPE_CHECKING:
    from typing_extensions import Buffer

    class NumpyArray(Protocol):
        """To type checkers one is no buffer before Python 3.12."""

        @property
        def __array_interface__(self) -> dict[str, Any]: ...

    Tokens = Sequence[int] | Tensor | Buffer | NumpyArray

native = library.module(
    "radix_tree",
    sources=[f"radix_tree{part}.cpp" for part in ("_module", "", "_evict", "_look", "_snapshot")],
    summary="RadixTree, a prefix cache",
)

Node = NewType("Node", int)

_BYTES = {torch.int32: 4, torch.int64: 8}
_INT32 = torch.int32
_READ_HERE = (Tensor, tuple)  # what _ints is for; the module reads all else
_LONG = 1 << 16  # tokens to evict for which it pays to let other threads run
_MAGIC = b"jitk RadixTree 1"  # with the version of the format
_frombuffer, _new = torch.frombuffer, tuple.__new__  # a look-up less in calls that take a microsecond
_trees: weakref.WeakSet[RadixTree] = weakref.WeakSet()


class Match(NamedTuple):
    """What ``match_prefix`` found.

    Attributes:
        values: of the tokens that were found, int32 on the CPU.
        node: at which they end, for ``lock``, ``unlock`` and ``path``; it stays so until it is evicted.
        length: how many they are, a multiple of the page size.
    """

    values: Tensor
    node: Node
    length: int


@dataclass(frozen=True)
class Entry:
    """A node of the tree, as it was when it was asked for.

    Attributes:
        node, parent: their handles; that of the root for those at the top.
        tokens, values: between the parent and the node, int32.
        extra_key: of all nodes above and below it too.
        locks: of the node and of those below it.
        hits: how often ``insert`` went through it.
        used: a number that is higher than those of nodes that were used before.
        is_leaf: no node is below it.
    """

    node: Node
    parent: Node
    tokens: Tensor
    values: Tensor
    extra_key: str | None
    locks: int
    hits: int
    used: int
    is_leaf: bool


class RadixTree:
    """The prefixes in a KV cache: sequences of tokens, each token with a value, such as its slot.

    Tokens and values are ints from 0 to 2^31 - 1: lists, NumPy arrays and other buffers of int32 or int64, or such tensors on
    the CPU, which are read where they are. Sequences count by whole pages: what is behind the last one is left out.

    Sequences with another ``extra_key`` share nothing: say what else than the tokens decides the keys and values, such as the
    name of a LoRA adapter.

    Threads may use a tree at the same time: each call happens as a whole. What another thread may evict between two calls is
    held by a lock; ``match_prefix(..., lock=True)`` leaves no time between. Long calls let other threads run.

    ``len(tree)`` is how many tokens it holds. The class is compiled when the first tree is made, which takes 10 seconds and
    more; ``torch_jit_ops.build("radix_tree")`` does so ahead.

    Args:
        page_size: of the KV cache. Sequences are compared and parted at multiples of it.

    Raises:
        ValueError: the page size is not from 1 to 2^20.
        MissingCompiler: the tree is not compiled yet, and there is no compiler.
    """

    def __init__(self, page_size: int = 1) -> None:
        self._take(native.Tree(operator.index(page_size)))

    def _take(self, tree: Any) -> None:
        self._tree = tree
        self._match, self._insert, self._evict, self._lock, self._unlock = tree.calls()
        _trees.add(self)

    def match_prefix(self, tokens: Tokens, *, extra_key: str | None = None, lock: bool = False) -> Match:
        """Find the longest prefix that is here, which counts as used now. Where it ends inside of a node, the node is split.

        Args:
            tokens: the sequence.
            extra_key: see ``RadixTree``.
            lock: the node at once, so that no other thread can evict it.

        Raises:
            TypeError: the tokens are of another type, or on a device.
            ValueError: a token is out of range.
        """
        ints = _ints(tokens, "tokens") if isinstance(tokens, _READ_HERE) else tokens  # of memory that `tokens` keeps
        data, node, length = self._match(ints, extra_key, bool(lock))
        return _new(Match, (_frombuffer(data, dtype=_INT32) if length else _tensor(data), node, length))

    def insert(self, tokens: Tokens, values: Tokens, *, extra_key: str | None = None, counted: int = 0) -> int:
        """Add a sequence, which counts as used now.

        Args:
            tokens: the sequence.
            values: one for each token.
            extra_key: see ``RadixTree``.
            counted: how many tokens of it the same request has inserted before, as one does that is prefilled in chunks: nodes
                among them are not hit again.

        Returns:
            How long the prefix is that was here before. Its values stay those that the tree has, and ``values[:n]``, as far as
            they are others, are the caller's to free; so are those behind the last whole page.

        Raises:
            TypeError: tokens or values are of another type, or on a device.
            ValueError: one is out of range, or there are not as many values as tokens.
        """
        ints = _ints(tokens, "tokens") if isinstance(tokens, _READ_HERE) else tokens  # of memory that `tokens` keeps
        slots = _ints(values, "values") if isinstance(values, _READ_HERE) else values
        known: int = self._insert(ints, slots, extra_key, counted)
        return known

    def evict(self, tokens: int, policy: Literal["lru", "lfu"] = "lru") -> Tensor:
        """Remove leaves that are not locked, until so many tokens went or none is left.

        Nodes go whole, so there may be more than were asked for. One whose last child goes is a leaf.

        Args:
            tokens: how many.
            policy: ``"lru"``: the leaf goes first whose last use, by ``match_prefix`` or ``insert``, is longest ago. ``"lfu"``:
                the one through which ``insert`` went least often; of equal ones that whose last use is longest ago. No two
                leaves have the same last use.

        Returns:
            The values of the tokens that went, int32.

        Raises:
            ValueError: the number is negative, or there is no such policy.
        """
        if policy not in ("lru", "lfu"):
            raise ValueError(f"the policy must be 'lru' or 'lfu', got {policy!r}")
        wanted = min(operator.index(tokens), 2**62)
        if wanted < _LONG:
            return _tensor(self._evict(wanted, policy == "lfu", False))
        with forks.held_off():  # while other threads run, one of them might fork
            return _tensor(self._evict(wanted, policy == "lfu", True))

    def lock(self, node: Node) -> None:
        """Keep the node, and with it those above it, from being evicted, until ``unlock`` was called as often. The root needs
        no lock, and bears any number of both.

        Raises:
            ValueError: the node is not here any more.
        """
        self._lock(node)

    def unlock(self, node: Node) -> None:
        """Take back one ``lock`` of this node.

        Raises:
            ValueError: the node is not locked, or not here any more.
        """
        self._unlock(node)

    def path(self, node: Node) -> tuple[Tensor, Tensor]:
        """Tokens and values from the root to the node, int32.

        Raises:
            ValueError: the node is not here any more.
        """
        tokens, values = self._tree.path(node)
        return _tensor(tokens), _tensor(values)

    def reset(self) -> None:
        """Forget everything, what is locked too. All nodes are gone."""
        with forks.held_off():
            self._tree.reset()

    def nodes(self) -> Iterator[Entry]:
        """Every node as it is now, each before those below it, the eldest first."""
        return map(_entry, self._tree.nodes(False))

    def leaves(self) -> Iterator[Entry]:
        """Those of ``nodes`` that have none below them."""
        return map(_entry, self._tree.nodes(True))

    @property
    def page_size(self) -> int:
        """As it was given."""
        return int(self._tree.page_size)

    @property
    def total(self) -> int:
        """How many tokens are here: those that can be evicted, and those that are locked."""
        return int(self._tree.sizes()[0])

    @property
    def evictable(self) -> int:
        """How many tokens ``evict`` could remove."""
        return int(self._tree.sizes()[1])

    @property
    def protected(self) -> int:
        """How many tokens are locked."""
        return int(self._tree.sizes()[2])

    @property
    def node_count(self) -> int:
        """How many nodes there are, without the root."""
        return int(self._tree.sizes()[3])

    @property
    def nbytes(self) -> int:
        """How much memory the tree holds: 8 bytes for each token, and what nodes take."""
        return int(self._tree.sizes()[4])

    def __len__(self) -> int:
        return self.total

    def __repr__(self) -> str:
        total, evictable, _, nodes, _ = self._tree.sizes()
        return f"RadixTree(page_size={self.page_size}, {total} tokens, {evictable} evictable, {nodes} nodes)"

    def check(self) -> None:
        """Look whether all holds that must; for tests and for hunting bugs, as it reads the whole tree.

        Raises:
            RuntimeError: something does not.
        """
        with forks.held_off():
            self._tree.check()

    def save(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the tree, but no locks, into a file: a new one takes the place of that name whole, or not at all.

        The values are written as they are. They mean something after a restart only if the KV cache is there again too.

        Raises:
            OSError: it cannot be written.
        """
        from torch_jit_ops.store import files

        with forks.held_off():
            data = _MAGIC + self._tree.save()
        data += _checksum(data)
        if isinstance(file, (str, os.PathLike)):
            files.replace_file(Path(file), data)
        else:
            file.write(data)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | IO[bytes]) -> RadixTree:
        """The tree that ``save`` wrote, with nothing locked.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, is of another version, or is damaged.
        """
        data = Path(file).read_bytes() if isinstance(file, (str, os.PathLike)) else file.read()
        if data[:15] != _MAGIC[:15] or len(data) < len(_MAGIC):
            raise ValueError("this is no snapshot of a RadixTree")
        if data[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"the snapshot of a RadixTree is of the version {data[15:16]!r}; this torch_jit_ops reads 1")
        content = memoryview(data)[:-32]
        if len(content) < len(_MAGIC) or _checksum(content) != data[-32:]:
            raise ValueError("the snapshot of a RadixTree is damaged: its checksum is that of something else")
        tree = cls.__new__(cls)
        tree._take(native.Tree.load(content[len(_MAGIC) :]))
        return tree

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RadixTree cannot be pickled or copied: save() writes it, RadixTree.load() reads it")


def _checksum(data: Buffer) -> bytes:
    import hashlib

    return hashlib.sha256(data).digest()


def _entry(found: tuple[Any, ...]) -> Entry:
    node, parent, tokens, values, *rest = found
    return Entry(node, parent, _tensor(tokens), _tensor(values), *rest)


def _tensor(data: Any) -> Tensor:
    return torch.frombuffer(data, dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)


def _ints(given: Any, what: str) -> Any:
    """A tensor or a tuple as the module takes it, to which a tuple is the memory of a tensor."""
    if isinstance(given, tuple):
        return list(given)
    # What follows stands before every call: each look at a tensor is about 0.1 us.
    if not given.is_cpu:
        raise TypeError(f"{what} must be on the CPU, got a tensor on {given.device}\n  remedy: .cpu()")
    size = _BYTES.get(given.dtype)
    if size is None:
        raise TypeError(f"{what} must be int32 or int64, got a tensor of {given.dtype}")
    stride = given.stride()
    if len(stride) != 1:
        raise ValueError(f"{what} must have 1 dimension, got {len(stride)}")
    return given.data_ptr(), given.numel(), stride[0], size


def _free_in_child() -> None:
    for tree in list(_trees):
        tree._tree.free_in_child()


forks.in_child(_free_in_child)
