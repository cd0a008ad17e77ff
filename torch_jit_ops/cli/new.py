"""Start an op of your own: a package with its declaration, a CUDA and a CPU kernel, samples, and a test that passes as it is.

No file is overwritten. Then make it yours: the PyTorch function first, as it is what the test compares with; the kernels after.

examples:
  python -m torch_jit_ops new mylib::scale             writes mylib/__init__.py, mylib/csrc/scale.{cu,cpp}, test_scale.py
  python -m torch_jit_ops new mylib::scale --into ~/src/mylib && cd ~/src/mylib && python -m pytest
"""

from __future__ import annotations

import argparse
import importlib.machinery
import keyword
import re
import sys
from pathlib import Path

from torch_jit_ops.registry import libraries

_DECLARATION = '''\
"""The ops of my_library: ``torch.ops.my_library.my_op``. The import defines them; the first call compiles a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch_jit_ops import OpLibrary, Sample, SampleMaker

library = OpLibrary("my_library", csrc=Path(__file__).parent / "csrc")


def _samples(make: SampleMaker) -> Iterator[Sample]:
    """The shapes that could break the kernels, each with its reason."""
    yield Sample((make.randn(7, 64), 2.0), note="a usual one")
    yield Sample((make.randn(3, 5, 101), -0.5), note="odd width, more dimensions")
    yield Sample((make.randn(100_003), 1.0), note="many blocks and a tail")
    yield Sample((make.randn(0, 8), 2.0), note="no tokens")


@library.op(cuda="my_op.cu", cpu="my_op.cpp", variant="my_library::my_op<{input.dtype}>", samples=_samples)
def my_op(input: Tensor, factor: float) -> Tensor:
    """``input * factor``.

    Args:
        input: any shape, contiguous, fp16, bf16 or fp32.
        factor: any number.

    Returns:
        The shape and dtype of ``input``; computed in fp32 and rounded once.
    """
    return input * factor
'''

_CUDA = """\
// my_op on CUDA: a thread for each element.
#include <jitk/result.h>  // Output
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>

namespace my_library {

using namespace jitk;

template <typename T>
__global__ void my_op_kernel(T* __restrict__ out, const T* __restrict__ input, float factor, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) out[i] = device::cast<T>(device::cast<fp32_t>(input[i]) * factor);
}

template <typename T>
void my_op(TensorView input, double factor, Output& out) {
  using namespace host;
  const TensorView result = out.empty_like(input);
  // 1. Match.
  SymbolicDims shape{"shape"};
  SymbolicDevice device;
  TensorMatcher({shape}).with_device<kDLCUDA>(device).with_dtype<T>().verify(input).verify(result);
  // 2. Plan.
  const T* from = static_cast<const T*>(input.data_ptr());
  T* to = static_cast<T*>(result.data_ptr());
  const float by = static_cast<float>(factor);
  const int64_t count = input.numel();
  constexpr int32_t kThreads = 256;
  // 3. Launch.
  LaunchKernel(div_ceil(count, kThreads), kThreads, device.unwrap())(my_op_kernel<T>, to, from, by, count);
}

}  // namespace my_library
"""

_CPU = """\
// my_op on the CPU: the elements are shared among PyTorch's threads.
#include <jitk/result.h>  // Output, parallel_for
#include <jitk/tensor.h>  // TensorMatcher

namespace my_library {

using namespace jitk;

template <typename T>
void my_op(TensorView input, double factor, Output& out) {
  using namespace host;
  const TensorView result = out.empty_like(input);
  // 1. Match.
  SymbolicDims shape{"shape"};
  TensorMatcher({shape}).with_device<kDLCPU>().with_dtype<T>().verify(input).verify(result);
  // 2. Plan.
  const T* from = static_cast<const T*>(input.data_ptr());
  T* to = static_cast<T*>(result.data_ptr());
  constexpr int64_t kGrain = 32768;  // elements: fewer are done before a second thread has started
  // 3. Run.
  parallel_for(input.numel(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from_float<T>(to_float(from[i]) * static_cast<float>(factor));
  });
}

}  // namespace my_library
"""

_TEST = '''\
"""my_op against the function that declares it, on every device that is here."""

from __future__ import annotations

import os

import my_library
from torch_jit_ops.testing import check

os.environ["JITK_FALLBACK"] = "error"  # or a machine without a compiler would compare the function with itself


def test_my_op() -> None:
    check(my_library.my_op)
'''

_FILES = {
    "my_library/__init__.py": _DECLARATION,
    "my_library/csrc/my_op.cu": _CUDA,
    "my_library/csrc/my_op.cpp": _CPU,
    "test_my_op.py": _TEST,
}
_CPP_KEYWORDS = """
 alignas alignof and asm auto bitand bitor bool break case catch char class compl const constexpr continue decltype
default delete do double else enum explicit export extern false float for friend goto if inline int long mutable
namespace new noexcept not nullptr operator or private protected public register return short signed sizeof static
struct switch template this throw true try typedef typeid typename union unsigned using virtual void volatile while xor
device host jitk std
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="library::op", help="as mylib::scale; a plain name becomes myops::name")
    parser.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")


def run(options: argparse.Namespace) -> int:
    library, separator, op = options.name.partition("::")
    if not separator:
        library, op = "myops", options.name
    for name in (library, op):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in _CPP_KEYWORDS.split():
            raise ValueError(f"{name!r} cannot name a library or an op: it must be snake_case, and no keyword of Python or C++")
    taken = importlib.machinery.PathFinder.find_spec(library)
    if library in {each.namespace for each in libraries()} or library in sys.stdlib_module_names or taken is not None:
        raise ValueError(f"there is a library {library!r} already; add the op to it, or choose another name")
    files = {options.into / _named(path, library, op): _named(text, library, op) for path, text in _FILES.items()}
    for file in files:
        if file.exists():
            raise ValueError(f"{file} is there already, and nothing is overwritten")
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        print(file)
    print(f"\ntry it:  cd {options.into} && python -m pytest test_{op}.py")
    return 0


def _named(text: str, library: str, op: str) -> str:
    return text.replace("my_library", library).replace("my_op", op)
