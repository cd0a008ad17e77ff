"""Settings of the whole suite: they must be in the environment before PyTorch is imported.

``JITK_TEST_CACHE_DIR``  keep the compiled kernels here; default: a folder that goes when the session ends
``JITK_TEST_DEVICES``    such as ``cpu,cuda``; default: cpu, and cuda where there is one
``JITK_TEST_MINIMUM``    fail if fewer tests pass in a run of all of them
``JITK_FUZZ``            try so many times the cases of every fuzzer (see fuzz.py)

Under pytest-xdist the processes share one folder, so that a kernel is compiled once for all of them; the cache is made for
that. What a process does to the environment, to PyTorch or to the registry stays with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))  # 0: this process runs all tests, or starts those that do
if not _WORKERS:
    os.environ["JITK_TEST_FOLDER"] = tempfile.mkdtemp(prefix="jitk-test-")
_FOLDER = os.environ["JITK_TEST_FOLDER"]
os.environ["JITK_CACHE_DIR"] = os.environ.get("JITK_TEST_CACHE_DIR") or os.path.join(_FOLDER, "kernels")
os.environ["JITK_VERBOSE"] = "0"
os.environ["JITK_FALLBACK"] = "error"  # a suite that tests references against themselves would pass
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_FOLDER, "inductor")
# Threads of a pool that wait for work by spinning make a busy machine four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if _WORKERS:
    # Each process would start as many threads, and as many compilers, as there are cores. Fewer than 2 would test nothing.
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "MAX_JOBS"):
        os.environ.setdefault(name, str(max(2, len(os.sched_getaffinity(0)) // _WORKERS)))
# These caches ignore a changed fake or schema (pytorch#160472).
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ["CI"] = "1"  # PyTorch then raises where an op breaks the promises of its schema, and warns otherwise

import pytest  # noqa: E402
import torch  # noqa: E402
import trial_library  # noqa: E402, F401  (its ops join the registry, so every generic test covers them)
import user_library  # noqa: E402, F401  (the same)

from torch_jit_ops import fallback  # noqa: E402
from torch_jit_ops.builder import compiler_jobs  # noqa: E402
from torch_jit_ops.builder.load import load  # noqa: E402
from torch_jit_ops.calling import dispatcher  # noqa: E402

pytest_plugins = ["alone", "minimum"]

# Of a GPU's memory, for each process: PyTorch's context and Inductor's programs, and the largest tensors of a usual test.
_GPU_BYTES = 4 << 30


def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: as many as compilers can run, since that is what most of the time goes into, and as a GPU has memory for."""
    if named := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return int(named)
    count = compiler_jobs.compiler_jobs()
    for device in range(torch.cuda.device_count()):
        count = min(count, torch.cuda.get_device_properties(device).total_memory // _GPU_BYTES)
    return max(1, count)


@pytest.fixture(autouse=True, scope="session")
def _dispatcher() -> None:
    """In a process of pytest-xdist: the dispatcher is loaded from the shared store, whatever test comes first."""
    if _WORKERS:
        with contextlib.suppress(RuntimeError):  # tests that need a compiler say so themselves
            dispatcher.library()
            load(dispatcher.autograd_unit())


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
    if not _WORKERS:
        shutil.rmtree(_FOLDER, ignore_errors=True)
