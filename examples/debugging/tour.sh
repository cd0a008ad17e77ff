#!/bin/sh
# The commands of docs/debugging.md, one after another, on a machine with a GPU. What a tool says goes to the output; a tool that is
# not there is named. Usage: sh examples/debugging/tour.sh [PYTHON]
cd "$(dirname "$0")/../.." || exit 1
python=${1:-python}
program=examples/debugging/differences.py
JITK_CACHE_DIR=$(mktemp -d)
export JITK_CACHE_DIR
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

step() {
  printf '\n== %s\n' "$*"
  if command -v "$1" >/dev/null || [ "${1#*=}" != "$1" ]; then
    env "$@" 2>&1
  else
    echo "$1 is not installed"
  fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$python" -c 'import torch; print("PyTorch", torch.__version__)'
step "$python" $program

# printf: a line for the thread that is one too many
sed '1i #include <cstdio>
s|  if (i <= count) |  if (i >= count) printf("i = %lld of %lld\\n", (long long)i, (long long)count);\n&|' \
  examples/debugging/differences.cu >"$JITK_CACHE_DIR/differences.cu"
cp $program "$JITK_CACHE_DIR"
step "$python" "$JITK_CACHE_DIR/differences.py"

step JITK_DEBUG=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --print-limit 1 "$python" $program
step JITK_DEBUG=1 cuda-gdb -batch -ex "set breakpoint pending on" -ex "break differences.cu:13 if i == 128" -ex run \
  -ex "info cuda kernels" -ex "print i" -ex "print count" -ex "print blockIdx" -ex "print threadIdx" --args "$python" $program
step ncu --set basic --import-source yes --kernel-name differences_kernel "$python" $program
