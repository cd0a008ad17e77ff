"""Where ``inductor.fuse`` says that it put ops: the paths of modules, and each place once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import traced_by
from torch import Tensor, nn

from torch_jit_ops.inductor import fuse


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([SiluMul(), SiluMul()])

    def forward(this, x: Tensor) -> Tensor:  # the compiled frame names its root after its argument
        for gate in this.gates:
            x = gate(x, x + 1)
        return x


class SiluMul(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Broken(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = self.gates[0](x, x + 1)
        torch._dynamo.graph_break()
        x = self.gates[1](x, x + 1)
        torch._dynamo.graph_break()
        return self.gates[0](x, x + 1)


GATES = Gates()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (GATES, ["gates.1"]),
        (lambda x: GATES(x), ["gates.1"]),
        (nn.Sequential(GATES, nn.ReLU()), []),
        ((lambda models: lambda x: models["a"][1](x))({"a": [None, GATES]}), ["gates.1"]),
        (GATES.forward, ["gates.1"]),
        ((lambda gates: lambda x: gates.gates[1](x, x))(GATES), ["gates.1"]),
    ],
    ids=["module", "global", "sequential", "items", "method", "part"],
)
def test_paths_start_at_what_is_compiled_whatever_it_is_called(function: Callable[..., Any], expected: list[str]) -> None:
    rewrite = fuse(where="gates.1")
    with torch.no_grad():
        torch.compile(function, backend=traced_by(rewrite))(torch.randn(4, 32))
    assert [entry.module for entry in rewrite.report().done] == expected


def test_a_path_in_a_sequential_starts_with_a_number() -> None:
    rewrite = fuse(where="0.gates.*")
    with torch.no_grad():
        torch.compile(nn.Sequential(GATES, nn.ReLU()), backend=traced_by(rewrite))(torch.randn(4, 32))
    assert [entry.module for entry in rewrite.report().done] == ["0.gates.0", "0.gates.1"]


def test_a_module_that_is_called_on_both_sides_of_a_graph_break_is_two_places() -> None:
    rewrite = fuse()
    with torch.no_grad():
        compiled = torch.compile(Broken(), backend=traced_by(rewrite))
        for tokens in (4, 5, 6):  # traced again with symbolic sizes
            compiled(torch.randn(tokens, 32))
    assert [entry.module for entry in rewrite.report().done] == ["gates.0", "gates.1", "gates.0"]
