"""Ops in models that ``torch.compile`` compiles: put there, or taken apart.

    from torch_jit_ops.inductor import decompose, fuse

    model = torch.compile(model, options=fuse().options())

Imported by name only: it needs ``torch._inductor``, which ``import torch_jit_ops`` leaves alone.
"""

from torch_jit_ops.inductor.decomposition import Decomposition as Decomposition
from torch_jit_ops.inductor.decomposition import decompose as decompose
from torch_jit_ops.inductor.fusion import Fusion as Fusion
from torch_jit_ops.inductor.fusion import fuse as fuse
from torch_jit_ops.inductor.report import Entry as Entry
from torch_jit_ops.inductor.report import Report as Report
from torch_jit_ops.inductor.rewrite import Rewrite as Rewrite
