#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, the gpu tests,
# compute-sanitizer, every benchmark, ncu; then a summary of what passed.
#
#   OUT=<folder> [PEERS=<folder>] [COMMIT=<hash>] [SECONDS_ALL=570] \
#     bash benchmarks/run_gpu.sh [--dry]
#
# OUT gets at most 8 files: log.txt, summary.txt, a CSV per benchmark (its picture is drawn from it,
# benchmarks/picture.py), ncu.csv.
# PEERS holds wheels of the rivals (installed into a temporary folder, without a network) and, in
# PEERS/sj14, the wheel of SpikingJelly 0.0.0.0.14. COMMIT is for copies that lack a .git folder.
# Made where there is a network:
#   pip wheel --no-deps -w peers spikingjelly==2.0.0 snntorch==1.0.0 norse==1.1.0 sinabs==3.1.3 \
#     loguru==0.7.3 nir==1.0.8 nirtorch==2.6 pbr==7.1.3 einops==0.8.2
#   pip wheel --no-deps -w peers/sj14 spikingjelly==0.0.0.0.14
# Downloads nothing: torch, CuPy, pybind11, ninja, setuptools, pytest and hypothesis must be there.
#
# --dry does what a machine without a GPU can: builds for the CPU, collects the tests, runs every
# benchmark tiny on the CPU, prints the commands of the GPU tools. It fails when any of it does.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
dry=0
[ "${1:-}" = --dry ] && dry=1
OUT=${OUT:-benchmarks/results/gpu}
SECONDS_ALL=${SECONDS_ALL:-570}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt
: >"$log"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
names=() verdicts=()
status=0

# step NAME LIMIT COMMAND...: runs it within LIMIT seconds and within what is left of all.
step() {
  local name=$1 limit=$2 left=$((SECONDS_ALL - SECONDS)) began=$SECONDS code=0
  shift 2
  printf '\n=== %s (at %ss)\n' "$name" "$SECONDS" | tee -a "$log"
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    code=no-time
  else
    timeout -k 5 "$limit" "$@" >"$work/step.txt" 2>&1 || code=$?
    cat "$work/step.txt" >>"$log"
    tail -n 25 "$work/step.txt"
  fi
  verdict "$name" "$code" $((SECONDS - began))
}

verdict() {
  local word=pass
  [ "$2" = 0 ] || { word="FAIL ($2)"; status=1; }
  [ "$2" = 124 ] && word="FAIL (over its time)"
  names+=("$1") verdicts+=("$word ${3:-0}s")
}

# gpu_step: as step; with --dry the command is only printed, with what it needs named.
gpu_step() {
  if [ "$dry" = 1 ]; then
    printf '\n=== %s: would run:\n  timeout %s %s\n' "$1" "$2" "${*:3}" | tee -a "$log"
    names+=("$1") verdicts+=("printed")
  else
    step "$@"
  fi
}

keep() {
  for file in "$@"; do
    [ -f "$work/results/$file" ] && cp -f "$work/results/$file" "$OUT/"
  done
}

device=cuda
build=(env SNNKERNELS_CPU=1 SNNKERNELS_CUDA=1)
collect=()
tiny=()
if [ "$dry" = 1 ]; then
  device=cpu
  build=(env SNNKERNELS_CPU=1 SNNKERNELS_CUDA=0)
  collect=(--collect-only)
  tiny=(--quick)
else
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "torch sees no GPU here; --dry does what can be done without one"
    exit 2
  }
  build+=("SNNKERNELS_ARCHS=$arch")
fi

sj14=()
if [ -n "${PEERS:-}" ]; then
  pip=("$PYTHON" -m pip install -q --no-index --no-deps --no-compile)
  step "peers" 60 "${pip[@]}" --target "$work/peers" "$PEERS"/*.whl
  # Behind the repository, so that no wheel of ours is taken for the source.
  export PYTHONPATH="$PYTHONPATH:$work/peers"
  if compgen -G "$PEERS/sj14/*.whl" >/dev/null; then
    step "SpikingJelly 0.0.0.0.14" 30 "${pip[@]}" --target "$work/sj14" "$PEERS"/sj14/*.whl
    sj14=(--sj14 "$work/sj14")
  fi
fi

gpu_step "device" 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step "build" 200 "${build[@]}" "$PYTHON" setup.py -q build_ext --inplace
step "info" 20 "$PYTHON" -m snnkernels info
step "gpu tests" 110 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider \
  ${collect[@]+"${collect[@]}"}

# A benchmark saves after every case: what --seconds or the limit cuts off loses nothing.
bench() {
  local file=$1 limit=$2
  shift 2
  step "$file" "$limit" "$PYTHON" "benchmarks/$file.py" --device "$device" --out "$work/results" \
    ${tiny[@]+"${tiny[@]}"} "$@"
}
bench bench_neuron 200 --seconds 180 --case-seconds 1 --rounds 7 \
  --section forward outputs training dtypes limits ${sj14[@]+"${sj14[@]}"}
keep "neuron_$device.csv"
bench bench_overhead 45 --seconds 35 --rounds 7
keep "overhead_$device.csv"
bench bench_memory 60 --seconds 45 --dtype float32
keep "memory_$device.csv"
bench bench_maps 40
keep "maps_$device.csv"
bench bench_gpu_network 150 --seconds 130 --rounds 15 --case-seconds 4
keep "network_$device.csv" network_maps.csv

# The caching allocator hides overruns; one launch at a time makes errors point at their kernel. A
# sanitizer slows a run a hundredfold: one test of each kind, and our kernels alone where the tool
# allows it (initcheck has to see everybody's writes): the filter reads mangled names, and all of
# ours are in namespace snn.
small="test_tables or test_by_hand or test_offsets_into_a_sentinel_buffer or test_chunks_of_time"
small+=" or test_qcfs_worked_example or test_pool_worked_example or test_dsr_worked_example"
small+=" or test_mmse_worked_example or test_histogram_stays_inside_its_table"
small+=" or test_ttfs_worked_example or test_bit_planes_worked_example or test_packed_layouts"
sanitize() {
  local tool=$1 limit=$2 only=()
  [ "$tool" = initcheck ] || only=(--kernel-name kns=_ZN3snn)
  gpu_step "compute-sanitizer $tool" "$limit" \
    env PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 \
    compute-sanitizer --tool "$tool" ${only[@]+"${only[@]}"} --error-exitcode 9 \
    "$PYTHON" -m pytest -m gpu -q -x -p no:cacheprovider -k "($small) and cuda"
}
sanitize memcheck 60
step "five kernels" 30 "$PYTHON" benchmarks/five_kernels.py --device "$device"
ncu=(ncu --clock-control none --kernel-name "regex:if_" --csv --log-file "$OUT/ncu.csv" --section
  SpeedOfLight --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis)
if [ "$dry" = 1 ] || command -v ncu >/dev/null; then
  gpu_step "ncu" 45 "${ncu[@]}" "$PYTHON" benchmarks/five_kernels.py --device cuda
fi
sanitize initcheck 60
sanitize racecheck 40
sanitize synccheck 40

{
  printf '\n=== summary (%ss%s)\n' "$SECONDS" "$([ "$dry" = 1 ] && echo ", dry")"
  for i in "${!names[@]}"; do printf '%-32s %s\n' "${names[$i]}" "${verdicts[$i]}"; done
  [ "$status" = 0 ] && echo "complete: every step passed" || echo "NOT complete"
} | tee "$OUT/summary.txt"
exit "$status"
