"""The built-in ops, a module for each family. Adding an op touches its family's module here and its kernels in csrc/."""

from torch_jit_ops.ops import activation as activation
from torch_jit_ops.ops import kv_cache as kv_cache
from torch_jit_ops.ops import norm as norm
from torch_jit_ops.ops import radix_tree as radix_tree
from torch_jit_ops.ops import rope as rope
from torch_jit_ops.ops import transfer as transfer
from torch_jit_ops.ops.library import library as library
