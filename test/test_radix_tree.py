"""``RadixTree`` against the model in plain Python, its errors, its snapshots, and its threads."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import os
import pickle
import random
import re
import resource
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from child import ROOT
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import radix_tree as benchmark
from bench.radix_model import Model
from bench.radix_model import Node as ModelNode
from torch_jit_ops import RadixTree
from torch_jit_ops.ops import radix_tree
from torch_jit_ops.ops.radix_tree import Node


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Here, so that no test is timed with it."""
    RadixTree()


def error(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def listing(tree: RadixTree) -> list[tuple[Any, ...]]:
    """All that there is to know of a tree, but handles and locks."""
    entries = list(tree.nodes())
    places = {entry.node: index for index, entry in enumerate(entries)}
    return [
        (places.get(e.parent), e.tokens.tolist(), e.values.tolist(), e.extra_key, e.hits, e.used, e.is_leaf) for e in entries
    ]


# --- against the model -----------------------------------------------------------------------------

_tokens = st.lists(st.integers(0, 2), max_size=14)
_keys = st.sampled_from([None, None, "", "a"])
_which = st.integers(0, 100)
_operation = st.one_of(
    st.tuples(st.just("match"), _tokens, _keys, st.booleans()),
    st.tuples(st.just("insert"), _tokens, _keys, st.integers(0, 14)),
    st.tuples(st.just("evict"), st.integers(0, 12), st.sampled_from(["lru", "lfu"])),
    st.tuples(st.just("lock"), _which),
    st.tuples(st.just("unlock"), _which),
    st.tuples(st.just("path"), _which),
    st.tuples(st.sampled_from(["reload", "reset"])),
)


def in_some_form(tokens: list[int]) -> Any:
    """One of those that are read in different ways."""
    forms: list[Callable[[list[int]], Any]] = [
        list,
        lambda ints: array("q", ints),
        lambda ints: np.array(ints, dtype=np.int32),
        lambda ints: torch.tensor(ints, dtype=torch.int64),
        lambda ints: torch.tensor([ints, ints], dtype=torch.int64).t()[:, 0],
    ]
    return forms[sum(tokens) % len(forms)](tokens)


class Both:
    """A tree and its model, to which the same happens. Handles stay in a list when their nodes are gone."""

    def __init__(self, page_size: int) -> None:
        self.tree = RadixTree(page_size)
        self.model = Model(page_size)
        self.handles: list[tuple[Node, ModelNode]] = []
        self.slots = 0

    def do(self, what: str, *args: Any) -> None:
        getattr(self, what)(*args)
        self.compare()

    def match(self, tokens: list[int], key: str | None, lock: bool) -> None:
        found = self.tree.match_prefix(in_some_form(tokens), extra_key=key, lock=lock)
        values, node, length = self.model.match_prefix(tokens, key, lock)
        assert (found.values.tolist(), found.length) == (values.tolist(), length)
        self.handles.append((found.node, node))

    def insert(self, tokens: list[int], key: str | None, counted: int) -> None:
        values = torch.arange(self.slots, self.slots + len(tokens))
        self.slots += len(tokens)
        length = self.tree.insert(in_some_form(tokens), values, extra_key=key, counted=counted)
        assert length == self.model.insert(tokens, values, key, counted)

    def evict(self, count: int, policy: Any) -> None:
        assert self.tree.evict(count, policy).tolist() == self.model.evict(count, policy).tolist()

    def lock(self, which: int) -> None:
        self.same(which, self.tree.lock, self.model.lock)

    def unlock(self, which: int) -> None:
        self.same(which, self.tree.unlock, self.model.unlock)

    def path(self, which: int) -> None:
        def as_lists(node: Node) -> object:
            return tuple(part.tolist() for part in self.tree.path(node))

        self.same(which, as_lists, self.model.path)

    def same(self, which: int, of_tree: Callable[[Node], object], of_model: Callable[[ModelNode], object]) -> None:
        if not self.handles:
            return
        node, model_node = self.handles[which % len(self.handles)]
        try:
            expected = of_model(model_node)
        except ValueError:
            with pytest.raises(ValueError, match="the node is not"):
                of_tree(node)
        else:
            assert of_tree(node) == expected

    def reload(self) -> None:
        """A tree that was saved has all but locks and handles, so it takes the place of one without any."""
        file = io.BytesIO()
        self.tree.save(file)
        file.seek(0)
        loaded = RadixTree.load(file)
        loaded.check()
        assert listing(loaded) == listing(self.tree)
        if self.tree.protected == 0:
            self.tree = loaded
            self.handles = []

    def reset(self) -> None:
        if self.slots % 5 == 0:  # seldom, or no tree would grow
            self.tree.reset()
            for node in self.model.nodes():
                node.parent = None
            self.model.root = ModelNode(None, array("q"), torch.empty(0), None)  # so that the former root is gone too
            self.handles = []
            self.model.reset()

    def compare(self) -> None:
        tree, model = self.tree, self.model
        tree.check()
        assert (tree.evictable, tree.protected) == (model.evictable, model.protected)
        assert len(tree) == tree.total == tree.evictable + tree.protected
        places = {entry.node: index for index, entry in enumerate(tree.nodes())}
        model_places = {node: index for index, node in enumerate(model.nodes())}
        expected = []
        for node in model.nodes():
            parent = None if node.parent is None else model_places.get(node.parent)
            label = (parent, node.tokens.tolist(), node.values.tolist(), node.extra_key)
            expected.append((*label, node.locks, node.hits, node.used, not node.children))
        found = [
            (places.get(e.parent), e.tokens.tolist(), e.values.tolist(), e.extra_key, e.locks, e.hits, e.used, e.is_leaf)
            for e in tree.nodes()
        ]
        assert found == expected
        assert [e.node for e in tree.leaves()] == [e.node for e in tree.nodes() if e.is_leaf]
        assert tree.node_count == len(found)


@settings(
    max_examples=len(fuzz.seeds(250)),
    deadline=None,
    derandomize=True,  # the same examples in every run; a longer run tries more
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from([1, 2, 3, 5]), st.lists(_operation, min_size=5, max_size=40))
def test_it_does_what_the_model_does(page_size: int, operations: list[tuple[Any, ...]]) -> None:
    both = Both(page_size)
    for operation in operations:
        both.do(*operation)


@pytest.mark.parametrize("seed", fuzz.seeds(3))
def test_it_does_what_the_model_does_for_long(seed: int) -> None:
    """Longer sequences of longer prompts than hypothesis makes: many nodes, a full cache, both policies in turn."""
    choose = random.Random(seed)
    both = Both(choice := choose.choice([1, 4, 16]))
    prompts: list[list[int]] = []
    locked: list[int] = []
    for step in range(300):
        start = choose.choice(prompts)[: choose.randrange(200)] if prompts and choose.random() < 0.7 else []
        prompts.append(start + [choose.randrange(50) for _ in range(choose.randrange(120))])
        both.match(prompts[-1], None, True)
        locked.append(len(both.handles) - 1)
        both.insert(prompts[-1], None, 0)
        if len(locked) > 8:
            both.unlock(locked.pop(choose.randrange(len(locked))))
        if both.tree.total > 3000:
            both.evict(choose.randrange(500), choose.choice(["lru", "lfu"]))
        if step % 25 == 0:
            both.compare()
    assert both.tree.page_size == choice
    both.compare()


# --- what is what ----------------------------------------------------------------------------------


def test_a_prefix_is_found_and_kept() -> None:
    tree = RadixTree(page_size=2)
    assert tree.insert([1, 2, 3, 4, 5], [10, 11, 12, 13, 14]) == 0  # the 5 is no whole page
    assert tree.insert([1, 2, 7, 8], [20, 21, 22, 23]) == 2
    values, node, length = tree.match_prefix([1, 2, 7, 8, 9, 9])
    assert (values.tolist(), values.dtype, length) == ([10, 11, 22, 23], torch.int32, 4)
    assert [part.tolist() for part in tree.path(node)] == [[1, 2, 7, 8], [10, 11, 22, 23]]
    assert tree.match_prefix([3, 4]).length == 0
    assert (len(tree), tree.total, tree.evictable, tree.protected, tree.node_count) == (6, 6, 6, 0, 3)
    assert repr(tree) == "RadixTree(page_size=2, 6 tokens, 6 evictable, 3 nodes)"
    assert len(RadixTree()) == 0 and list(RadixTree().nodes()) == []


def test_extra_keys_share_nothing() -> None:
    tree = RadixTree()
    tree.insert([1, 2], [1, 2])
    assert tree.match_prefix([1, 2], extra_key="lora").length == 0
    assert tree.insert([1, 2, 3], [3, 4, 5], extra_key="lora") == 0
    assert tree.match_prefix([1, 2, 3], extra_key="lora").values.tolist() == [3, 4, 5]
    assert tree.match_prefix([1, 2, 3]).values.tolist() == [1, 2]
    assert tree.match_prefix([1, 2], extra_key="").length == 0  # an empty text is a key of its own
    assert [entry.extra_key for entry in tree.nodes()] == [None, "lora"]


def test_the_last_used_goes_last() -> None:
    tree = RadixTree()
    for first in (1, 2, 3):
        tree.insert([first, 9], [first, first + 10])
    tree.match_prefix([1, 9])
    assert [tree.evict(1).tolist() for _ in range(3)] == [[2, 12], [3, 13], [1, 11]]


def test_where_a_prompt_leaves_a_node_what_is_behind_it_was_not_used() -> None:
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    tree.insert([5, 6], [5, 6])
    tree.match_prefix([1, 2])
    assert [tree.evict(1).tolist() for _ in range(3)] == [[3, 4], [5, 6], [1, 2]]


def test_what_was_hit_least_goes_first() -> None:
    tree = RadixTree()
    for first in (1, 2, 3):
        tree.insert([first, 9], [first, first + 10])
    tree.insert([1, 9], [0, 0])
    tree.match_prefix([2, 9])  # no hit: a scheduler asks again and again for what waits
    assert [tree.evict(1, "lfu").tolist() for _ in range(3)] == [[3, 13], [2, 12], [1, 11]]


def test_chunks_of_a_request_are_one_hit() -> None:
    tree = RadixTree()
    tree.insert([1, 2], [1, 2])
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4], counted=2)
    tree.insert([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], counted=4)
    assert [entry.hits for entry in tree.nodes()] == [1, 1, 1]


def test_what_is_locked_stays_and_what_is_above_it() -> None:
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    node = tree.match_prefix([1, 2], lock=True).node
    tree.lock(node)
    assert (tree.evictable, tree.protected) == (2, 2)
    assert tree.evict(100).tolist() == [3, 4]
    tree.unlock(node)
    assert tree.evict(100).tolist() == []
    tree.unlock(node)
    assert tree.evict(100).tolist() == [1, 2]
    assert len(tree) == 0


def test_a_locked_node_that_is_split_is_the_lower_half() -> None:
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    node = tree.match_prefix([1, 2, 3, 4], lock=True).node
    upper = tree.match_prefix([1, 2]).node
    assert [part.tolist() for part in tree.path(node)] == [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert tree.protected == 4
    assert error(lambda: tree.unlock(upper)).startswith("ValueError: the node is not locked")
    tree.unlock(node)
    assert tree.evictable == 4


def test_nodes_of_any_number_and_depth() -> None:
    tree = RadixTree()
    for token in range(5000):
        tree.insert([token], [token])
    for length in range(1, 1000):
        tree.insert(range(length), range(length))
    assert tree.node_count == 5000 + 998
    assert tree.match_prefix(range(2000)).length == 999
    tree.check()
    loaded = io.BytesIO()
    tree.save(loaded)
    assert listing(RadixTree.load(io.BytesIO(loaded.getvalue()))) == listing(tree)
    assert len(tree.evict(1 << 40)) == 5000 + 998
    tree.check()


def test_the_document_shows_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/radix_tree.md").read_text()
    program, printed = (re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)[0] for language in ("python", "text"))
    exec(compile(program, "docs/radix_tree.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_benchmark_runs_and_its_trees_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "SLOTS", 60_000)  # so that a short trace evicts
    monkeypatch.setattr(benchmark, "RUNNING", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for more in (["model"], ["by-token", "--cold"]):
        assert benchmark.main(["--requests", "40", "--pages", "3", "--tokens", *benchmark.FORMS, "--beside", *more]) == 0
    assert capsys.readouterr().out.count("| evict") == 2 * len(benchmark.FORMS)


# --- what tokens are -------------------------------------------------------------------------------

_SOME = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 2**31 - 1]


@pytest.mark.parametrize(
    "given_as",
    [
        list,
        tuple,
        lambda ints: [np.int64(each) for each in ints],
        lambda ints: array("i", ints),
        lambda ints: array("q", ints),
        lambda ints: memoryview(array("q", ints)),
        lambda ints: np.array(ints, dtype=np.int32),
        lambda ints: np.array(ints, dtype=np.int64),
        lambda ints: np.array(ints[::-1], dtype=np.int64)[::-1],
        lambda ints: np.array([ints, ints], dtype=np.int32).T[:, 1],
        lambda ints: np.frombuffer(b"x" + np.array(ints, dtype=np.int32).tobytes(), dtype=np.int32, offset=1),
        lambda ints: torch.tensor(ints, dtype=torch.int32),
        lambda ints: torch.tensor(ints, dtype=torch.int64),
        lambda ints: torch.tensor([ints, ints]).t()[:, 1],
        lambda ints: torch.tensor([0, *ints], dtype=torch.int32)[1:],
        lambda ints: torch.tensor(ints[:1]).expand(13) if len(set(ints)) == 1 else torch.tensor(ints),
    ],
)
def test_tokens_come_as_they_are(given_as: Callable[[list[int]], Any]) -> None:
    tree = RadixTree()
    for tokens in (_SOME, [7] * 13, []):
        assert tree.insert(given_as(tokens) if tokens else [], given_as(tokens) if tokens else []) == 0
        assert tree.match_prefix(given_as(tokens) if tokens else []).values.tolist() == tokens
    tree.check()


def test_empty_arrays_and_tensors() -> None:
    tree = RadixTree()
    for empty in ([], (), array("q"), np.empty(0, np.int32), torch.empty(0, dtype=torch.int64), range(0)):
        assert tree.insert(empty, empty) == 0
        assert tree.match_prefix(empty)[0].shape == (0,)
    assert tree.match_prefix([]).node == tree.match_prefix([1]).node


def test_int32_is_read_where_it_is() -> None:
    """A copy of 256 MB would show."""
    tree = RadixTree()
    tokens = torch.zeros(1 << 26, dtype=torch.int32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert tree.match_prefix(tokens).length == 0
    assert tree.match_prefix(tokens.numpy()).length == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB


class _Shrinks:
    """Becomes an int, and takes the rest of the list away meanwhile."""

    def __init__(self, of: list[Any]) -> None:
        self.of = of

    def __index__(self) -> int:
        del self.of[1:]
        return 1


class _Fails:
    def __index__(self) -> int:
        raise KeyError("mine")


def test_tokens_that_are_none() -> None:
    tree = RadixTree()
    sly: list[Any] = [0, 1, 2]
    sly[0] = _Shrinks(sly)
    device = torch.empty(3, dtype=torch.int64, device="meta")
    emptied = torch.arange(3)
    emptied.untyped_storage().resize_(0)
    tokens: list[Any] = [
        5,
        None,
        "ab",
        b"ab",
        {1, 2},
        [1, "a"],
        [1.5],
        [[1]],
        [1, -1],
        [1 << 31],
        [1 << 80],
        [-(1 << 80)],
        sly,
        [_Fails()],
        np.array([1, -1]),
        np.array([1, -1], dtype=np.int32),
        np.array([1 << 31]),
        np.array([1.0]),
        np.array([[1]]),
        np.array([1], dtype=np.uint32),
        np.array([1], dtype=">i4"),
        torch.tensor([-1]),
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.tensor(1),
        torch.tensor([[1]]),
        device,
        emptied,
    ]
    assert_expected_inline(
        "\n".join(error(lambda given=given: tree.match_prefix(given)) for given in tokens),
        """\
TypeError: tokens must be a sequence of ints, an array or a tensor, got int
TypeError: tokens must be a sequence of ints, an array or a tensor, got NoneType
TypeError: tokens[0] must be an int, got str
TypeError: tokens must be int32 or int64, got an array of the format 'B'
TypeError: tokens must be a sequence of ints, an array or a tensor, got set
TypeError: tokens[1] must be an int, got str
TypeError: tokens[0] must be an int, got float
TypeError: tokens[0] must be an int, got list
ValueError: tokens[1] is -1, which is not from 0 to 2147483647
ValueError: tokens[0] is 2147483648, which is not from 0 to 2147483647
ValueError: tokens[0] is above 2^63, which is not from 0 to 2147483647
ValueError: tokens[0] is below -2^63, which is not from 0 to 2147483647
ValueError: tokens became shorter while they were read
KeyError: 'mine'
ValueError: tokens[1] is -1, which is not from 0 to 2147483647
ValueError: tokens[1] is -1, which is not from 0 to 2147483647
ValueError: tokens[0] is 2147483648, which is not from 0 to 2147483647
TypeError: tokens must be int32 or int64, got an array of the format 'd'
ValueError: tokens must have 1 dimension, got 2
TypeError: tokens must be int32 or int64, got an array of the format 'I'
TypeError: tokens must be int32 or int64, got an array of the format '>i'
ValueError: tokens[0] is -1, which is not from 0 to 2147483647
TypeError: tokens must be int32 or int64, got a tensor of torch.float32
TypeError: tokens must be int32 or int64, got a tensor of torch.bool
ValueError: tokens must have 1 dimension, got 0
ValueError: tokens must have 1 dimension, got 2
TypeError: tokens must be on the CPU, got a tensor on meta
  remedy: .cpu()
ValueError: tokens must have memory, got a tensor without""",
    )
    assert tree.node_count == 0


def test_what_is_refused() -> None:
    tree: Any = RadixTree(page_size=2)
    tree.insert([1, 2], [1, 2])
    node = tree.match_prefix([1, 2]).node
    calls: list[Callable[[], object]] = [
        lambda: RadixTree(0),
        lambda: RadixTree(-1),
        lambda: RadixTree((1 << 20) + 1),
        lambda: RadixTree("1"),  # type: ignore[arg-type]
        lambda: tree.insert([1, 2], [1]),
        lambda: tree.insert([1, 2, 3, 4], [1, 2, 3, -4]),
        lambda: tree.insert([1, 2, 3, 4], [1, 2, 3, "a"]),
        lambda: tree.insert([1, 2], [1, 2], counted=-1),
        lambda: tree.insert([1, 2], [1, 2], counted="1"),
        lambda: tree.match_prefix([1, 2], extra_key=3),
        lambda: tree.match_prefix([1, 2], extra_key="\ud800"),
        lambda: tree.evict(-1),
        lambda: tree.evict("all"),
        lambda: tree.evict(1, "mru"),
        lambda: tree.lock(None),
        lambda: tree.lock(-1),
        lambda: tree.lock(1 << 64),
        lambda: tree.lock(12345),
        lambda: tree.unlock(node),
        lambda: tree.path(0),
        lambda: pickle.dumps(tree),
        lambda: copy.copy(tree),
        lambda: copy.deepcopy(tree),
    ]
    assert_expected_inline(
        "\n".join(map(error, calls)),
        """\
ValueError: page_size must be from 1 to 1048576, got 0
ValueError: page_size must be from 1 to 1048576, got -1
ValueError: page_size must be from 1 to 1048576, got 1048577
TypeError: 'str' object cannot be interpreted as an integer
ValueError: there must be a value for each token, got 2 tokens and 1 values
ValueError: values[3] is -4, which is not from 0 to 2147483647
TypeError: values[3] must be an int, got str
ValueError: counted must not be negative, got -1
TypeError: 'str' object cannot be interpreted as an integer
TypeError: extra_key must be a str or None, got int
UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed
ValueError: tokens must not be negative, got -1
TypeError: 'str' object cannot be interpreted as an integer
ValueError: the policy must be 'lru' or 'lfu', got 'mru'
TypeError: node must be what match_prefix returned, got NoneType
ValueError: node must be what match_prefix returned, got -1
ValueError: node must be what match_prefix returned, got 18446744073709551616
ValueError: the node is not in this tree: it was evicted, or the tree was reset, or it is another tree's
ValueError: the node is not locked: each unlock belongs to one lock of it
ValueError: the node is not in this tree: it was evicted, or the tree was reset, or it is another tree's
TypeError: a RadixTree cannot be pickled or copied: save() writes it, RadixTree.load() reads it
TypeError: a RadixTree cannot be pickled or copied: save() writes it, RadixTree.load() reads it
TypeError: a RadixTree cannot be pickled or copied: save() writes it, RadixTree.load() reads it""",
    )
    assert (len(tree), tree.protected) == (2, 0)
    tree.check()


def test_the_root_bears_locks() -> None:
    tree = RadixTree()
    root = tree.match_prefix([1], lock=True).node
    for _ in range(3):
        tree.unlock(root)
    assert [part.tolist() for part in tree.path(root)] == [[], []]


def test_handles_of_what_is_gone() -> None:
    tree = RadixTree()
    tree.insert([1, 2], [1, 2])
    gone = tree.match_prefix([1, 2]).node
    tree.evict(2)
    tree.insert([1, 2], [3, 4])  # takes the place of the first, by its number
    here = tree.match_prefix([1, 2]).node
    assert here != gone and here & 0xFFFFFFFF == gone & 0xFFFFFFFF
    other = RadixTree()
    other.insert([1, 2], [1, 2])
    root = tree.match_prefix([7]).node
    text = "ValueError: the node is not in this tree: it was evicted, or the tree was reset, or it is another tree's"
    for tree_, node in ((tree, gone), (other, here), (other, root)):
        for call in (tree_.lock, tree_.unlock, tree_.path):
            assert error(lambda call=call, node=node: call(node)) == text
    tree.lock(here)
    tree.reset()
    for node in (here, root):
        assert error(lambda node=node: tree.unlock(node)) == text
    assert (len(tree), tree.protected, tree.node_count) == (0, 0, 0)
    tree.check()


# --- snapshots -------------------------------------------------------------------------------------


def small_tree() -> RadixTree:
    tree = RadixTree(page_size=2)
    tree.insert([1, 2, 3, 4], [10, 11, 12, 13])
    tree.insert([1, 2, 5, 6], [0, 0, 14, 15], extra_key=None)
    tree.insert([1, 2], [16, 17], extra_key="lora ü")
    return tree


def saved(tree: RadixTree) -> bytes:
    file = io.BytesIO()
    tree.save(file)
    return file.getvalue()


def test_a_tree_comes_back(tmp_path: Path) -> None:
    tree = small_tree()
    tree.match_prefix([1, 2], lock=True)
    file = tmp_path / "tree"
    tree.save(file)
    tree.save(str(file))  # in the place of the first
    assert os.listdir(tmp_path) == ["tree"] and file.read_bytes() == saved(tree)
    loaded = RadixTree.load(file)
    loaded.check()
    assert listing(loaded) == listing(tree)
    assert (loaded.page_size, loaded.protected, loaded.evictable) == (2, 0, 8)
    assert saved(loaded) == saved(tree)
    # And goes on as the first would: the same clock, the same turns.
    tree.unlock(tree.match_prefix([1, 2]).node)
    loaded.match_prefix([1, 2])
    assert [loaded.evict(1).tolist() for _ in range(4)] == [tree.evict(1).tolist() for _ in range(4)]
    assert saved(RadixTree.load(io.BytesIO(saved(RadixTree(7))))) == saved(RadixTree(7))


def test_a_file_that_cannot_be_written_leaves_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tree"
    small_tree().save(file)
    former = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no more"):
            RadixTree().save(file)
    assert file.read_bytes() == former and os.listdir(tmp_path) == ["tree"]
    with pytest.raises(FileNotFoundError):
        small_tree().save(tmp_path / "missing" / "tree")
    with pytest.raises(FileNotFoundError):
        RadixTree.load(tmp_path / "missing")


def with_checksum(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def test_what_is_no_snapshot() -> None:
    data = saved(small_tree())
    magic = len(radix_tree._MAGIC)
    inside = data[:-32]
    texts = [
        b"",
        b"jitk",
        b"PK\x03\x04 something else",
        data[: magic - 1] + b"2" + data[magic:],
        data[:magic],
        data[:-1],
        data + b"\0",
        with_checksum(inside + b"\0"),
        with_checksum(inside[:-1]),
        with_checksum(data[:magic] + bytes(8) + inside[magic + 8 :]),  # page size 0
        with_checksum(data[:magic] + b"\3" + inside[magic + 1 :]),  # of 3
        with_checksum(inside[: magic + 24] + b"\xff" * 8 + inside[magic + 32 :]),  # so many nodes
        with_checksum(inside.replace("ü".encode(), b"\xff\xff")),
        with_checksum(inside[:-4] + b"\xff\xff\xff\xff"),
    ]
    assert_expected_inline(
        "\n".join(error(lambda text=text: RadixTree.load(io.BytesIO(text))) for text in texts),
        """\
ValueError: this is no snapshot of a RadixTree
ValueError: this is no snapshot of a RadixTree
ValueError: this is no snapshot of a RadixTree
ValueError: the snapshot of a RadixTree is of the version b'2'; this torch_jit_ops reads 1
ValueError: the snapshot of a RadixTree is damaged: its checksum is that of something else
ValueError: the snapshot of a RadixTree is damaged: its checksum is that of something else
ValueError: the snapshot of a RadixTree is damaged: its checksum is that of something else
ValueError: the snapshot of a RadixTree is damaged: it is of another length
ValueError: the snapshot of a RadixTree is damaged: it is of another length
ValueError: the snapshot of a RadixTree is damaged: its page size is none
ValueError: the snapshot of a RadixTree is damaged: a node has an impossible size
ValueError: the snapshot of a RadixTree is damaged: a number is too large
ValueError: the snapshot of a RadixTree is damaged: an extra key is no text
ValueError: the snapshot of a RadixTree is damaged: a token or value is negative""",
    )


def test_every_cut_and_every_flipped_bit_of_a_snapshot_is_noticed() -> None:
    data = saved(small_tree())
    assert len(data) < 500
    damaged = [data[:length] for length in range(len(data))]
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for each in damaged:
        with pytest.raises(ValueError):
            RadixTree.load(io.BytesIO(each))


@pytest.mark.parametrize("chunk", range(4))
def test_a_snapshot_that_was_written_by_others_is_a_tree_or_an_error(chunk: int) -> None:
    """Their checksum is right, and what it covers is anything."""
    inside = saved(small_tree())[:-32]
    magic = len(radix_tree._MAGIC)
    loaded = 0
    for seed in fuzz.seeds(1500):
        choose = random.Random(4 * seed + chunk)
        data = bytearray(inside)
        for _ in range(choose.randint(1, 3)):
            place = choose.randrange(magic, len(data))
            kind = choose.randrange(5)
            if kind == 0:
                data[place] ^= 1 << choose.randrange(8)
            elif kind == 1:
                data[place] = choose.choice([0, 1, 2, 127, 128, 255])
            elif kind == 2:
                place = magic + (place - magic) // 8 * 8
                data[place : place + 8] = choose.choice(
                    [0, 1, 2, 3, 8, 1 << 31, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]
                ).to_bytes(8, "little")
            elif kind == 3:
                del data[place:]
                break
            else:
                data[place:place] = bytes(choose.randrange(1, 9))
        try:
            tree = RadixTree.load(io.BytesIO(with_checksum(bytes(data))))
        except ValueError as refused:
            assert str(refused).startswith(("the snapshot of a RadixTree is damaged: ", "page_size")), f"seed {seed}"
        else:
            loaded += 1
            tree.check()
            assert listing(RadixTree.load(io.BytesIO(saved(tree)))) == listing(tree)
            held = len(tree)
            assert (len(tree.evict(1 << 40, "lfu")), len(tree)) == (held, 0)
    assert loaded


# --- threads, processes, memory --------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as caught:
            failures.append(caught)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_share_a_tree() -> None:
    """Each request keeps what it has locked, whatever the others evict, write and reset meanwhile."""
    tree = RadixTree(page_size=4)

    def work(index: int) -> None:
        choose = random.Random(index)
        for step in range(300):
            tokens = [choose.randrange(3) for _ in range(choose.randrange(40))]
            key = choose.choice([None, "a"])
            tree.insert(tokens, [index] * len(tokens), extra_key=key)
            found = tree.match_prefix(tokens, extra_key=key, lock=True)
            kind = choose.randrange(6)
            if kind == 0:
                tree.evict(choose.choice([10, 1 << 20]), choose.choice(["lru", "lfu"]))
            elif kind == 1:
                tree.check()
            elif kind == 2:
                RadixTree.load(io.BytesIO(saved(tree))).check()
            elif kind == 3:
                list(tree.nodes())
            path_tokens, values = tree.path(found.node)
            assert path_tokens.tolist() == tokens[: found.length], step
            assert values.tolist() == found.values.tolist()
            tree.unlock(found.node)

    in_threads(6, work)
    tree.check()
    assert tree.protected == 0
    tree.evict(1 << 40)
    assert len(tree) == 0


def test_a_child_may_use_the_tree_of_its_parent() -> None:
    """Whatever the parent's threads were in the middle of."""
    tree = RadixTree()
    tree.insert(range(200_000), range(200_000))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            saved(tree)
            tree.check()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    tree.check()
                    tree.insert([5, 6], [5, 6])
                    status = 0 if tree.match_prefix([5, 6, 7]).length == 2 and len(tree.evict(1 << 40)) == 200_002 else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(tree) == 200_000


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_what_the_tokens_take() -> None:
    tree = RadixTree()
    choose = random.Random(0)
    tensors = [torch.tensor([choose.randrange(100) for _ in range(64)]) for _ in range(200)]

    def operations(count: int) -> None:
        for index in range(count // 5):
            tokens = tensors[choose.randrange(200)][: choose.randrange(64)]
            found = tree.match_prefix(tokens, extra_key=f"key {index % 100_000}", lock=True)
            tree.insert(tokens, tokens, extra_key=f"key {index % 100_000}")
            tree.unlock(found.node)
            if tree.total > 20_000:
                tree.evict(1000, "lru" if index % 3 else "lfu")
            with pytest.raises(ValueError):
                tree.insert(np.array([1, -1]), [1, 2])

    operations(20_000)
    gc.collect()
    nbytes, resident = tree.nbytes, _resident()
    operations(100_000 * min(len(fuzz.seeds(1)), 10))
    gc.collect()
    tree.check()
    assert tree.nbytes < 2 * nbytes
    assert _resident() - resident < 16 << 20
    tree.reset()
    assert tree.nbytes < nbytes


def test_8_bytes_for_a_token() -> None:
    tree = RadixTree()
    tokens = torch.randint(1000, (4096,))
    for first in range(200):
        tokens[0] = first
        tree.insert(tokens, tokens)
    assert 8 <= tree.nbytes / tree.total < 8.1


def test_results_are_memory_of_their_own() -> None:
    # The memory of a result that is gone serves the next one; that of one that is here must not.
    tree = RadixTree()
    sizes = [1, 1000, 1024, 1025, 5000, 300_000]
    for number, size in enumerate(sizes):
        tree.insert([number] * size, range(number, number + size))
    held = []
    for _ in range(3):
        for number, size in enumerate(sizes):
            found = tree.match_prefix([number] * size).values
            assert torch.equal(found, torch.arange(number, number + size, dtype=torch.int32))
            held += [tree.match_prefix([number] * size).values.add_(number), found][: number % 3]
            del found
    copies = [each.clone() for each in held]
    went = tree.evict(len(tree))
    assert len(went) == sum(sizes) and len(tree) == 0
    went.fill_(-1)
    assert all(map(torch.equal, held, copies))


def test_a_tensor_outlives_its_tree() -> None:
    tree = RadixTree()
    tree.insert([1, 2], [3, 4])
    values = tree.match_prefix([1, 2]).values
    del tree
    gc.collect()
    values += 1
    assert values.tolist() == [4, 5]
