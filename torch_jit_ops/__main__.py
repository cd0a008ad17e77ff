"""``python -m torch_jit_ops``."""

import sys

from torch_jit_ops.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
