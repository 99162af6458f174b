#!/bin/sh
# The table of docs/performance.md on the GPU at hand: what does not fit is refused and left out.
#
#   sh benchmarks/bench_decode.sh out.csv [out.png]
set -u
csv=$1
plot=${2:+--plot $2}
decode() { jax-flashllm bench decode --csv "$csv" $plot "$@"; }
decode --config opt-13b --sparsity 0.6 --batch 1 8 --dense --long-prompt 1024
decode --config opt-30b --sparsity 0.6 --batch 1 8 --dense --long-prompt 1024
decode --config opt-30b --sparsity 0.7 --batch 1 8 32 64
decode --config opt-66b --sparsity 0.7 --batch 1 8
decode --config opt-66b --sparsity 0.8 --batch 1 7 8 64 --dense --long-prompt 1024
decode --config opt-175b --sparsity 0.8 --batch 1 8
for one in "opt-13b 0.6" "opt-30b 0.6" "opt-30b 0.7" "opt-66b 0.7" "opt-66b 0.8" "opt-175b 0.8"; do
  decode --config "${one% *}" --sparsity "${one#* }" --format delta_csr --batch 1
done
decode --config opt-175b --sparsity 0.8 --batch 32 --cache-dtype float8_e4m3fn
decode --config opt-13b --sparsity 0.6 --batch 8 --cache-dtype float8_e4m3fn
decode --config opt-13b --sparsity 0.6 --batch 8 --sample
here=$(dirname "$0")
python "$here/bench_transformers.py" --config opt-13b --batch 1 8 --csv "${1%.csv}_transformers.csv"
python "$here/bench_load.py" --dir packed-model --csv "${1%.csv}_load.csv"
