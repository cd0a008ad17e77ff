"""The library of the built-in ops: an OpLibrary like anybody's."""

from torch_jit_ops.builder.unit import csrc_dir
from torch_jit_ops.op_library import OpLibrary

library = OpLibrary("jitk", csrc=csrc_dir())

FLOATS = "float16|bfloat16|float32|float64"  # in what ops say of their tensors; float64 has no kernels, and runs the functions
