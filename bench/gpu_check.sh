#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, nvcc, torch and triton: builds, runs the tests that need
# a GPU, every op's bench against its peers, the end-to-end benches and compute-sanitizer.
#   bench/gpu_check.sh [--minutes M] [--dry-run] OUT_DIR
# The whole takes under 9 minutes; with fewer, every stage gets its share of them, starts no case
# that it has no time for, and stages that would get less than 5 seconds are left out. Stages stand
# alone: one that fails, hangs or is cut off takes nothing from the others, and what it had measured
# by then is in its JSON. What is not timed runs side by side; benches run alone, with the kernels and
# the peers that they need compiled before. --dry-run prints the stages with their limits, the group
# that runs side by side ("-" for none), and their commands.
# Writes to OUT_DIR, renewed after each stage: {ops,model,waterfall}_cuda.json, doctor.json,
# everything.tar.gz (these, the plots, NAME.out and NAME.err of each stage), and at the end
# summary.json; prints a closing table. Where the folder is no git checkout, COMMIT names what it holds.
# Exit: 0 if all stages passed, 1 if not, 2 for bad arguments, 3 without a GPU.
set -uo pipefail

usage() {
  echo "usage: bench/gpu_check.sh [--minutes M] [--dry-run] OUT_DIR" >&2
  exit 2
}

minutes=9 dry=0 out=
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-}; shift; [[ $minutes =~ ^[1-9][0-9]*$ ]] || usage ;;
    --dry-run) dry=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || usage
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
start=$SECONDS
work=$(mktemp -d) || exit 2
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work" "$work.tgz"' EXIT
summary=$work/stages.tsv
: > "$summary"
group=0 beside=

# limit_of BUDGET: seconds that a stage may take: its share of the minutes, and what is left of them.
limit_of() {
  local share=$(($1 * minutes / 9)) left=$((minutes * 60 - (SECONDS - start)))
  [ "$minutes" -ge 9 ] && share=$1
  echo $((share < left ? share : left))
}

# stage NAME BUDGET COMMAND…: runs within its time and goes on, however it ends. LIMIT and UNTIL in
# the command stand for the seconds that it has, and for when a bench should start no more cases.
stage() {
  local name=$1 budget=$2 limit begin rc ended
  shift 2
  limit=$(limit_of "$budget")
  local command=("${@//LIMIT/$limit}")
  command=("${command[@]//UNTIL/$((limit * 3 / 4))}")
  if [ "$dry" = 1 ]; then
    printf '%-10s %4d s  %s  %s\n' "$name" "$limit" "${beside:--}" "${command[*]}"
    return
  fi
  if [ "$limit" -lt 5 ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" skipped 0 "$limit" >> "$summary"
    return
  fi
  echo "== $name, up to $limit s"
  begin=$SECONDS
  timeout -k 5 "$limit" "${command[@]}" > "$work/$name.out" 2> "$work/$name.err" < /dev/null
  rc=$?
  case $rc in
    0) ended=passed ;;
    124 | 137) ended="cut off" ;;
    *) ended="exit $rc" ;;
  esac
  printf '%s\t%s\t%s\t%s\n' "$name" "$ended" $((SECONDS - begin)) "$limit" >> "$summary"
  echo "== $name: $ended"
  tail -n 30 "$work/$name.out"
  [ "$rc" = 0 ] || tail -n 8 "$work/$name.err"
  [ -n "$beside" ] || collect
}

# beside STAGE…: a stage that runs beside the next ones, until together.
beside() {
  [ -n "$beside" ] || group=$((group + 1))
  beside=$group
  if [ "$dry" = 1 ]; then stage "$@"; else stage "$@" & fi
}

together() {
  beside=
  [ "$dry" = 1 ] && return
  wait
  collect
}

# What there is by now: a run that is cut off as a whole leaves it.
collect() {
  local name
  for name in ops_cuda model_cuda waterfall_cuda doctor; do
    [ ! -s "$work/$name.json" ] || cp "$work/$name.json" "$out/"
  done
  tar -C "$work" -czf "$work.tgz" . && mv "$work.tgz" "$out/everything.tar.gz"
}

if [ "$dry" = 0 ]; then
  capability=$(timeout 60 "$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch %s finds no CUDA device" % torch.__version__)
print("%d%d" % torch.cuda.get_device_capability())' 2> "$work/device.err") || {
    echo "gpu_check: no GPU to check: $(tail -n 1 "$work/device.err")." \
      "--dry-run shows the stages without one." >&2
    exit 3
  }
else
  capability=90
fi
# In place, for this GPU alone: the folder itself becomes importable and nothing is fetched.
# kernels/ is fastbert.kernels only once installed, so a link stands in for the installation.
if [ "$dry" = 0 ] && [ ! -e fastbert/kernels ]; then ln -s ../kernels fastbert/kernels; fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
cores=$(nproc)
workers=()
if "$python" -c 'import xdist' 2> /dev/null > /dev/null; then
  workers=(-n $((cores < 12 ? cores : 12)) --dist worksteal)
fi
bench() { echo "$python" "bench/$1.py" --device cuda; }

# tests NAME BUDGET ARGUMENTS…: a stage of pytest, without the reference itself on the GPU.
tests() {
  local name=$1 budget=$2
  shift 2
  stage "$name" "$budget" "$python" -m pytest -q --no-header -p no:cacheprovider --maxfail=30 \
    --tb=short "${workers[@]}" "$@"
}

# ops BUDGET NAME OP…: a stage that times these ops in bf16.
ops() {
  local budget=$1 name=$2 op chosen=()
  shift 2
  for op in "$@"; do chosen+=(--op "$op"); done
  # shellcheck disable=SC2046
  stage "$name" "$budget" $(bench run) "${chosen[@]}" --dtype bf16 --seconds 0.3 --until UNTIL \
    --out "$work/ops_cuda.json"
}

# models NAME BUDGET OPTIONS…: a stage that times whole models in bf16 against Hugging Face's, and
# other peers that are named.
models() {
  local name=$1 budget=$2
  shift 2
  # shellcheck disable=SC2046
  stage "$name" "$budget" $(bench model) --dtype bf16 --until UNTIL --out "$work/model_cuda.json" \
    --peer "HF eager" --peer "HF SDPA" "$@"
}

compiled=(--task pretraining --shape "B256 S128" --peer torch.compile
  --peer "torch.compile, gathered head")

# shellcheck disable=SC2046  # the words of bench are the command's
{
  beside build 115 env FASTBERT_CUDA=1 FASTBERT_CUDA_ARCHS="$capability" \
    "$python" setup.py -q build_ext --inplace
  case $capability in
    80 | 89 | 90 | 100)
      beside kernels 110 "$python" bench/triton_resources.py --arch "$capability" --dtype bf16 \
        --jobs $((cores / 4 + 1)) --out "$work/triton_resources.json"
      ;;
  esac
  beside peers 110 $(bench run) --warm --dtype bf16 --until UNTIL --op add_layer_norm \
    --op bias_gelu --op feed_forward --op attention --op linear_cross_entropy --op embed_layer_norm
  beside compile 110 $(bench model) --warm --dtype bf16 "${compiled[@]}"
  tests tests 110 -m "gpu and not slow" -k "not reference-cuda" tests/train tests/hf tests/kernels \
    tests/ops tests/compress tests/finetune tests/bench
  together

  beside curve 30 "$python" -m pytest -q --no-header -p no:cacheprovider --tb=short \
    "${workers[@]}" -m "gpu and slow" tests/ops/test_loss_curve.py
  beside sanitize 30 "$python" bench/sanitize.py
  beside doctor 25 sh -c '"$1" -c "from fastbert.cli import main; main()" doctor --json > "$2"' \
    sh "$python" "$work/doctor.json"
  tests native 30 -m "gpu and not slow" -k "cuda-cuda or test_cuda_gpu" tests/native tests/ops
  together

  ops 45 attention attention
  ops 35 products linear_cross_entropy feed_forward linear_int8 linear_fp8
  ops 65 rows add_layer_norm bias_gelu embed_layer_norm optimizer add_layer_norm_int8 \
    quantize_rows quantize_rows_fp8 gather_rows scatter_rows
  models pretrain 50 --task pretraining --size base --size large --seconds 2
  models inference 40 --task inference --size base --size large --seconds 1
  stage waterfall 40 $(bench waterfall) --seconds 2 --out "$work/waterfall_cuda.json"
  models compiled 30 "${compiled[@]}" --seconds 2
  models training 20 --task training --seconds 1
  if [ -n "$sanitizer" ]; then
    # Without torch's cache of memory, past the end of each tensor is nobody's.
    beside memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool memcheck --error-exitcode 9 "$python" bench/sanitize.py
    stage racecheck 40 "$sanitizer" --tool racecheck --error-exitcode 9 "$python" bench/sanitize.py
    together
  fi
  stage plots 10 "$python" bench/plots.py "$work"
}
[ "$dry" = 1 ] && exit 0

"$python" - "$summary" "$out/summary.json" "$minutes" $((SECONDS - start)) << 'PYTHON'
import json
import sys

rows = [line.rstrip("\n").split("\t") for line in open(sys.argv[1], encoding="utf-8")]
stages = [
    {"stage": name, "ended": ended, "seconds": int(seconds), "limit": int(limit)}
    for name, ended, seconds, limit in rows
]
result = {"minutes": int(sys.argv[3]), "seconds": int(sys.argv[4]), "stages": stages}
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(result, file, indent=1)
print(f"== closing table (whole run: {sys.argv[4]} s)")
for stage in stages:
    print(f"{stage['stage']:<12}{stage['ended']:<10}{stage['seconds']:>4} of {stage['limit']} s")
raise SystemExit(any(stage["ended"] not in ("passed", "skipped") for stage in stages))
PYTHON
