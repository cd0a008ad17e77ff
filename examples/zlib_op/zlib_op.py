"""A C library as an op: zlib's checksum of each row. Run me: ``python zlib_op.py``."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker

library = OpLibrary("zlib_op", csrc=Path(__file__).parent)


def _samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 100),), note="rows")
    yield Sample((make.randn(2, 3, 4096),), note="two leading dimensions")
    yield Sample((make.randn(64),), note="one row")
    yield Sample((make.randn(5, 0),), note="rows without bytes")


def _fake(data: Tensor) -> Tensor:
    return data.new_empty(data.shape[:-1], dtype=torch.int64)


@library.op(
    cpu="crc32.cpp",
    variant="zlib_op::crc32",
    ldflags={"cpu": ["-lz"]},
    dtypes=(torch.uint8,),
    rows=("data",),
    fake=_fake,
    samples=_samples,
)
def crc32(data: Tensor) -> Tensor:
    """The CRC-32 of each row: ``data`` [..., bytes] uint8, contiguous, to [...] int64. As in gzip and PNG."""
    rows = data.reshape(data.shape[:-1].numel(), data.shape[-1]).tolist()
    return torch.tensor([zlib.crc32(bytes(row)) for row in rows], device=data.device).reshape(data.shape[:-1]).long()


def main() -> None:
    data = torch.frombuffer(bytearray(b"a C library, as an operator of PyTorch"), dtype=torch.uint8)
    print("eager    ", hex(crc32(data)))
    print("compiled ", hex(torch.compile(crc32, fullgraph=True)(data)))
    print("Python   ", hex(zlib.crc32(bytes(data.tolist()))))


if __name__ == "__main__":
    main()
