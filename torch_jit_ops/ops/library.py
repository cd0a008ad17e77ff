"""The library of the built-in ops: an OpLibrary like anybody's."""

import torch

from torch_jit_ops.builder.unit import csrc_dir
from torch_jit_ops.op_library import OpLibrary

library = OpLibrary("jitk", csrc=csrc_dir())

FLOATS = "float16|bfloat16|float32|float64"  # in what ops say of their tensors; float64 has no kernels, and runs the functions

INTEGERS = (torch.int32, torch.int64)  # of positions and indices
# By bytes, the dtype as which elements are moved: not every operation of PyTorch knows every dtype.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
