#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, the gpu tests, compute-sanitizer, the benchmark.
#
#   OUT=<folder for logs and rows> bash benchmarks/run_gpu.sh
#
# Downloads nothing: torch, CuPy, pybind11, ninja, setuptools, pytest and hypothesis must be there
# (Python 3.11 or newer).
set -uo pipefail
cd "$(dirname "$0")/.."
# Test the package that is installed here, not the source folder.
export PYTHONSAFEPATH=1
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
status=0
step() {
  echo "=== $1"
  shift
  "$@" 2>&1 | tee -a "$OUT/log.txt" || { echo "FAILED: $*" | tee -a "$OUT/log.txt"; status=1; }
}
arch=$(python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
step "device" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step "build" env SNNKERNELS_CPU=1 SNNKERNELS_CUDA=1 SNNKERNELS_ARCHS="$arch" \
  python -m pip install -q --no-build-isolation --no-deps --force-reinstall .
step "info" python -m snnkernels info
step "gpu tests" python -m pytest -m gpu -q
# The caching allocator hides overruns; one launch at a time makes errors point at their kernel. A
# sanitizer slows a run a hundredfold: one test of each kind.
small="test_tables or test_by_hand or test_offsets_into_a_sentinel_buffer or test_chunks_of_time"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck initcheck racecheck synccheck; do
    step "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 \
      timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python -m pytest -m gpu -q -k "($small) and cuda"
  done
else
  echo "compute-sanitizer is not installed" | tee -a "$OUT/log.txt"
fi
step "benchmark" env -u PYTHONSAFEPATH python benchmarks/neuron.py --device cuda --peer none
cp -f benchmarks/results/neuron_cuda.csv "$OUT/" 2>/dev/null
exit $status
