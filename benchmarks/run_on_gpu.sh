#!/bin/bash
# Tests and timings of the CUDA kernels in one go, on a machine with a GPU.
#
#   bash benchmarks/run_on_gpu.sh PREBUILT [tests|bench|profile ...]
#
# PREBUILT holds jax_flashllm/_flashllm*.so and libflashllm_cuda_api.so, and perhaps `lib`,
# a folder of Python packages. Results go to $OUT.
set -u
here=$PWD prebuilt=$PWD/$1
shift
site=$(mktemp -d)
cp -r jax_flashllm "$site/"
cp -r models "$site/jax_flashllm/models"
cp "$prebuilt"/jax_flashllm/*.so "$site/jax_flashllm/"
export PYTHONPATH="$site:$prebuilt/lib" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
library=$prebuilt/libflashllm_cuda_api.so
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
for step in "$@"; do
  case $step in
    tests)
      (cd /tmp && timeout 240 python3 -m pytest -q --maxfail=12 -p no:cacheprovider \
        --rootdir "$here" -c "$here/pyproject.toml" -m gpu "$here"/tests/test_gpu*.py \
        > "$OUT/tests.log" 2>&1; tail -60 "$OUT/tests.log" | cut -c1-300)
      ;;
    bench)
      python3 benchmarks/gpu_timing.py --library "$library" ${BENCH:-} 2>&1 | tee "$OUT/bench.log"
      ;;
    profile)
      for s in 0.5 0.8; do
        timeout 100 ncu --kernel-name regex:BitmapKernel --launch-count 1 \
          --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
          --section MemoryWorkloadAnalysis_Tables --section ComputeWorkloadAnalysis \
          --section LaunchStats --metrics smsp__inst_executed.sum,l1tex__data_pipe_lsu_wavefronts.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,l1tex__data_pipe_lsu_wavefronts_mem_lg.sum,sm__cycles_active.avg \
          python3 benchmarks/gpu_timing.py --library "$library" --once --shapes 28672x7168 \
          --sparsity $s --tokens 8 > "$OUT/ncu-$s.log" 2>&1
        grep -E "inst_executed.sum|wavefronts|cycles_active|Duration|Issue|stall|Stall|Elig|No Elig|Executed Ipc|pct" "$OUT/ncu-$s.log" | head -30
      done
      ;;
  esac
done
