#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, nvcc, torch and triton: builds, runs the tests that need
# a GPU, every op's bench against its peers, the end-to-end benches and compute-sanitizer.
#   bench/gpu_check.sh [--minutes M] [--dry-run] OUT_DIR
# The whole takes under 9 minutes; with fewer, every stage gets its share of them, starts no case
# that it has no time for, and stages that would get less than 5 seconds are left out. Stages stand
# alone: one that fails, hangs or is cut off takes nothing from the others, and what it had measured
# by then is in its JSON. --dry-run prints the stages with their commands and limits.
# Writes to OUT_DIR: NAME.out and NAME.err of each stage, {ops_*,model,waterfall}_cuda.json,
# doctor.json, summary.json, the plots; prints a closing table. Exit: 0 if all stages passed, 1 if
# not, 2 for bad arguments, 3 without a GPU.
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
summary=$out/stages.tsv
: > "$summary"

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
    printf '%-10s %4d s  %s\n' "$name" "$limit" "${command[*]}"
    return
  fi
  if [ "$limit" -lt 5 ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" skipped 0 "$limit" >> "$summary"
    return
  fi
  echo "== $name, up to $limit s"
  begin=$SECONDS
  timeout -k 5 "$limit" "${command[@]}" > "$out/$name.out" 2> "$out/$name.err" < /dev/null
  rc=$?
  case $rc in
    0) ended=passed ;;
    124 | 137) ended="cut off" ;;
    *) ended="exit $rc" ;;
  esac
  printf '%s\t%s\t%s\t%s\n' "$name" "$ended" $((SECONDS - begin)) "$limit" >> "$summary"
  tail -n 30 "$out/$name.out"
  [ "$rc" = 0 ] || tail -n 8 "$out/$name.err"
}

if [ "$dry" = 0 ]; then
  capability=$(timeout 60 "$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch %s finds no CUDA device" % torch.__version__)
print("%d%d" % torch.cuda.get_device_capability())' 2> "$out/device.err") || {
    echo "gpu_check: no GPU to check: $(tail -n 1 "$out/device.err")." \
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
bench() { echo "$python" "bench/$1.py" --device cuda; }

# ops BUDGET NAME OP…: a stage that times these ops in bf16.
ops() {
  local budget=$1 name=$2 op chosen=()
  shift 2
  for op in "$@"; do chosen+=(--op "$op"); done
  # shellcheck disable=SC2046
  stage "$name" "$budget" $(bench run) "${chosen[@]}" --dtype bf16 --seconds 0.4 --until UNTIL \
    --out "$out/ops_${name}_cuda.json"
}

# shellcheck disable=SC2046  # the words of bench are the command's
{
  stage build 110 env FASTBERT_CUDA=1 FASTBERT_CUDA_ARCHS="$capability" \
    "$python" setup.py -q build_ext --inplace
  stage doctor 20 sh -c '"$1" -c "from fastbert.cli import main; main()" doctor --json > "$2"' \
    sh "$python" "$out/doctor.json"
  stage tests 95 "$python" -m pytest -q -m "gpu and not slow" --no-header -p no:cacheprovider \
    --maxfail=30 --tb=short tests/kernels tests/ops tests/native tests/compress tests/train
  ops 35 attention attention
  ops 30 products feed_forward linear_cross_entropy linear_int8 linear_fp8
  ops 40 rows add_layer_norm bias_gelu embed_layer_norm add_layer_norm_int8 quantize_rows \
    quantize_rows_fp8 gather_rows scatter_rows
  ops 25 optimizers optimizer
  # Without torch.compile, which takes a minute for each shape of a whole model.
  stage pretrain 45 $(bench model) --task pretraining --peer "HF eager" --peer "HF SDPA" \
    --size base --size large --dtype bf16 --seconds 2 --until UNTIL --out "$out/model_cuda.json"
  stage inference 40 $(bench model) --task inference --peer "HF eager" --peer "HF SDPA" \
    --size base --size large --dtype bf16 --seconds 1 --until UNTIL --out "$out/model_cuda.json"
  stage waterfall 40 $(bench waterfall) --seconds 3 --out "$out/waterfall_cuda.json"
  if [ -n "$sanitizer" ]; then
    stage memcheck 25 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" bench/sanitize.py
    stage racecheck 15 "$sanitizer" --tool racecheck --error-exitcode 9 "$python" bench/sanitize.py
  fi
  stage plots 10 "$python" bench/plots.py "$out"
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
