#!/usr/bin/env bash
# Everything wanted from one NVIDIA GPU, in one call under ten minutes: the device tests, every kernel at 64, 256 and 1024
# images, whole steps with and without them. Rows are appended to benchmarks/results/{kernels,train}.csv; short tables come last.
#   benchmarks/gpu.sh            PYTHON=path/to/python benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" - <<'PROBE'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA device; an NVIDIA GPU was expected; on CPU run benchmarks/bench_kernels.py")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PROBE

# The benchmark runs even if a test fails: a wrong kernel's rows show its error. The status of the tests is the script's.
status=0
timeout 170 "$python" -m pytest -m gpu tests/kernels -q || status=$?
echo "device tests: $([ "$status" = 0 ] && echo passed || echo "FAILED ($status)")"
timeout 210 "$python" benchmarks/bench_train.py --device cuda --rounds 3 || status=$?
timeout 210 "$python" benchmarks/bench_kernels.py --device cuda --budget-s 0.2 || status=$?
exit "$status"
