"""The benchmarks of torch_jit_ops: ``python -m bench --help``.

Outside ``--json`` and ``--cache`` nothing is written but temporary directories.
"""
