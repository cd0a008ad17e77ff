"""The former names, until the last modules that use them are merged."""

from torch_jit_ops.builder.compilers import compiler_of as compiler_of
from torch_jit_ops.builder.errors import BuildError as BuildError
from torch_jit_ops.builder.errors import CompileRefused as CompileRefused
from torch_jit_ops.builder.errors import UnknownGpu as UnknownGpu
from torch_jit_ops.builder.load import find as find
from torch_jit_ops.builder.load import load as load
from torch_jit_ops.builder.shared_object import Loaded as Loaded
from torch_jit_ops.builder.unit import ABI_VERSION as ABI_VERSION
from torch_jit_ops.builder.unit import Unit as Unit
from torch_jit_ops.builder.unit import csrc_dir as csrc_dir
from torch_jit_ops.builder.unit import include_dir as include_dir
