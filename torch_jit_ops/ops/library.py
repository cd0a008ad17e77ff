"""The library of the built-in ops: an OpLibrary like anybody's."""

from torch_jit_ops.loader import csrc_dir
from torch_jit_ops.op import OpLibrary

library = OpLibrary("jitk", csrc=csrc_dir())
