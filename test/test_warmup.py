"""Kernels ahead of their first call: what is counted, what is compiled, what a manifest replays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import OpLibrary, loader

_SOURCE = """
#include <jitk/result.h>
#include <jitk/tensor.h>

namespace warmlib {

enum Way { forth, back };

template <typename T, int32_t kCount, Way kWay>
jitk::Tensor move(jitk::TensorView x) {
  static_assert(kCount != 13, "thirteen is not served");
  return jitk::host::empty_like(x);
}
template <typename T, int32_t kCount, Way kWay>
void move_out(jitk::TensorView, jitk::TensorView) {}

}  // namespace warmlib
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpLibrary]:
    folder = tmp_path_factory.mktemp("warmlib")
    (folder / "move.cpp").write_text(_SOURCE)
    made = OpLibrary("warmlib", csrc=folder)

    @made.op(cpu="move.cpp", variant="warmlib::move<{x.dtype}, {count}, warmlib::{way}>")
    def move(x: Tensor, count: int, way: Literal["forth", "back"] = "forth") -> Tensor:
        return x.clone()

    yield made
    torch_jit_ops.op._libraries.remove(made)  # the generic tests of other files want samples


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that is empty but for the dispatcher, and counters at zero."""
    shared = tmp_path_factory.getbasetemp() / "warm"
    shared.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("JITK_CACHE_DIR", str(shared))
    torch_jit_ops.reset_stats()
    yield
    torch_jit_ops.reset_stats()


def forget() -> None:
    """What a new process knows."""
    loader._results.clear()
    torch_jit_ops.reset_stats()


def unit(library: OpLibrary, count: int, way: str = "forth", dtype: torch.dtype = torch.float32) -> loader.Unit:
    return library.ops["move"].unit("cpu", (dtype, count, way), "x86-64")


def test_loads_are_counted_by_op(library: OpLibrary) -> None:
    loader.load(unit(library, 1))
    loader.load(unit(library, 1))  # in this process already: not a load
    forget()
    loader.load(unit(library, 1))
    loader.load(unit(library, 2))
    with pytest.raises(torch_jit_ops.BuildError):
        loader.load(unit(library, 13))
    found = torch_jit_ops.stats()
    assert list(found.ops) == ["warmlib::move"]
    assert found.total == found.ops["warmlib::move"]
    assert (found.total.hits, found.total.misses, found.total.builds) == (1, 2, 1)
    assert 0 < found.total.load_seconds < found.total.compile_seconds < 60
    torch_jit_ops.reset_stats()
    assert torch_jit_ops.stats() == torch_jit_ops.Statistics(torch_jit_ops.Stats(), {})
