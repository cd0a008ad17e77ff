"""Settings of the whole suite: they must be in the environment before PyTorch is imported.

``JITK_TEST_CACHE_DIR``  keep the compiled kernels here; default: a folder that goes when the session ends
``JITK_TEST_DEVICES``    such as ``cpu,cuda``; default: cpu, and cuda where there is one
``JITK_TEST_MINIMUM``    fail if fewer tests pass in a run of all of them
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

_FOLDER = tempfile.mkdtemp(prefix="jitk-test-")
os.environ["JITK_CACHE_DIR"] = os.environ.get("JITK_TEST_CACHE_DIR") or os.path.join(_FOLDER, "kernels")
os.environ["JITK_VERBOSE"] = "0"
os.environ["JITK_FALLBACK"] = "error"  # a suite that tests references against themselves would pass
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_FOLDER, "inductor")
# Threads of a pool that wait for work by spinning make a busy machine four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# These caches ignore a changed fake or schema (pytorch#160472).
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ["CI"] = "1"  # PyTorch then raises where an op breaks the promises of its schema, and warns otherwise

import pytest  # noqa: E402
import torch  # noqa: E402
import user_library  # noqa: E402, F401  (its ops join the registry, so every generic test covers them)
from minimum import pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: E402, F401

from torch_jit_ops import fallback  # noqa: E402


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """The same random numbers for each test; and new memory holds NaN, not the right results of an earlier test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with fallback.allowed():  # finite differences and truths are float64; where the kernel is meant, kernel_alone sees to it
        yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault of a kernel shows in the test that launched it
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def pytest_unconfigure() -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)
