"""Ops on DTensors, in two processes on gloo: tensor and sequence parallel models (dtensor_child.py holds the checks)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import dtensor_child
import pytest
from child import ROOT, run_python
from expecttest import assert_expected_inline


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process: what its checks said, or how they failed."""
    folder = tmp_path_factory.mktemp("dtensor")
    files = [folder / str(rank) for rank in range(2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, dtensor_child.__file__, str(rank), str(folder / "rendezvous"), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    for process in running:
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", [function.__name__.removeprefix("test_") for function in dtensor_child.TESTS])
def test_on_two_processes(findings: list[dict[str, Any]], name: str) -> None:
    for found in findings:
        assert "failed" not in found[f"test_{name}"], found[f"test_{name}"]["failed"]


def test_what_cannot_be_redistributed(findings: list[dict[str, Any]]) -> None:
    assert findings[0]["test_errors"] == findings[1]["test_errors"]
    assert_expected_inline(
        findings[0]["test_errors"]["said"],
        """\
RuntimeError: jitk::fused_add_rmsnorm: a DTensor that is written or passed by keyword cannot be redistributed
  expected  input Replicate(), residual Replicate(), weight Replicate()
            input Shard(dim=0), residual Shard(dim=0), weight Replicate()
  got       input Shard(dim=1), residual Shard(dim=1), weight Replicate()
  remedy: redistribute() it before the call
RuntimeError: jitk::fused_add_rmsnorm: a DTensor that is written or passed by keyword cannot be redistributed
  expected  input Replicate(), residual Replicate(), weight Replicate()
            input Shard(dim=0), residual Shard(dim=0), weight Replicate()
  got       input Shard(dim=0), residual Replicate(), weight Replicate()
  remedy: redistribute() it before the call
RuntimeError: jitk::fused_add_rmsnorm: a DTensor that is written or passed by keyword cannot be redistributed
  expected  input Replicate(), residual Replicate(), weight Replicate()
            input Shard(dim=0), residual Shard(dim=0), weight Replicate()
  got       input Shard(dim=0), residual Shard(dim=0), weight Shard(dim=0)
  remedy: redistribute() it before the call
RuntimeError: jitk::fused_add_rmsnorm: argument 'input' cannot be used as it is sharded
  expected  at least 2 in dimension 0, one for each shard
  got       1
  remedy: replicate it before the call
RuntimeError: jitk::fused_qknorm: a DTensor that is written or passed by keyword cannot be redistributed
  expected  q Replicate(), k Replicate(), q_weight Replicate(), k_weight Replicate()
            q Shard(dim=0), k Shard(dim=0), q_weight Replicate(), k_weight Replicate()
            q Shard(dim=1), k Shard(dim=1), q_weight Replicate(), k_weight Replicate()
  got       q Shard(dim=2), k Shard(dim=2), q_weight Replicate(), k_weight Replicate()
  remedy: redistribute() it before the call
RuntimeError: sharded::scaled: a DTensor that is written or passed by keyword cannot be redistributed
  expected  x Replicate(), by Replicate()
            x Shard(dim=0), by Replicate()
  got       x Shard(dim=0), by Shard(dim=0)
  remedy: redistribute() it before the call
NotImplementedError: Operator jitk.add_constant.default does not have a sharding strategy registered.""",
    )


def test_who_has_no_process_group_imports_nothing() -> None:
    """Dynamo imports DTensor, so every compiled model has it; the rest of it takes 25 ms."""
    code = """
import sys
import torch, torch.distributed.tensor, torch_jit_ops
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    print(torch.ops.jitk.relu2(torch.randn(3, 4)).shape)
print("torch.distributed.tensor.experimental" in sys.modules)
"""
    assert run_python(code) == "torch.Size([3, 4])\nFalse\n"
