"""Checks an op of anybody's: ``check(op)`` calls it with its samples and holds it to everything that ops promise.

import mylib
from torch_jit_ops.testing import check

def test_scale() -> None:
    check(mylib.scale)
"""

from torch_jit_ops.testing.check import check as check
