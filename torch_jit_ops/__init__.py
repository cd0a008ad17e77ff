"""PyTorch custom ops whose kernels compile themselves on first use.

    import torch, torch_jit_ops
    y = torch.ops.jitk.silu_and_mul(x)

The import defines the ops and compiles nothing.
"""

import warnings
from typing import TYPE_CHECKING

with warnings.catch_warnings():  # PyTorch says so on its import, and nothing here needs NumPy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch  # noqa: F401

from torch_jit_ops.backends.programs import MissingCompiler as MissingCompiler
from torch_jit_ops.backends.wheels import include_of as include_of
from torch_jit_ops.backends.wheels import library_of as library_of
from torch_jit_ops.builder.errors import BuildError as BuildError
from torch_jit_ops.declaring.rows import Rows as Rows
from torch_jit_ops.declaring.samples import Sample as Sample
from torch_jit_ops.declaring.samples import SampleMaker as SampleMaker
from torch_jit_ops.jit_module import Module as Module
from torch_jit_ops.jit_module import cache_once as cache_once
from torch_jit_ops.jit_module import load_jit as load_jit
from torch_jit_ops.jit_module import make_cpp_args as make_cpp_args
from torch_jit_ops.op import Op as Op
from torch_jit_ops.op_library import OpLibrary as OpLibrary
from torch_jit_ops.ops.library import library as library
from torch_jit_ops.ops.radix_tree import RadixTree as RadixTree
from torch_jit_ops.registry import libraries as libraries
from torch_jit_ops.statistics import Statistics as Statistics
from torch_jit_ops.statistics import Stats as Stats
from torch_jit_ops.statistics import reset_stats as reset_stats
from torch_jit_ops.statistics import stats as stats

if TYPE_CHECKING:
    from torch_jit_ops.ahead.build_ahead import Report as Report
    from torch_jit_ops.ahead.build_ahead import build as build
    from torch_jit_ops.ahead.deployment import Deployment as Deployment
    from torch_jit_ops.ahead.deployment import deploy as deploy

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """What few programs use is imported when it is asked for."""
    if name in ("Deployment", "deploy"):
        from torch_jit_ops.ahead import deployment

        return getattr(deployment, name)
    if name in ("Report", "build"):
        from torch_jit_ops.ahead import build_ahead

        return getattr(build_ahead, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
