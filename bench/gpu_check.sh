#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, nvcc, torch and triton: builds, runs the tests that need
# a GPU, every op's bench against its peers, and the end-to-end benches. Under 9 minutes.
#   bench/gpu_check.sh OUT_DIR
# Writes OUT_DIR/{ops_cuda,model_cuda,doctor}.json, OUT_DIR/tests.log and prints a short closing table.
set -uo pipefail
out=${1:?usage: bench/gpu_check.sh OUT_DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
declare -A verdict
start=$SECONDS

# step NAME SECONDS COMMAND…: runs within its time, keeps its log, notes how it ended and goes on.
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  local rc=${PIPESTATUS[0]}
  verdict[$name]="exit $rc in $((SECONDS - begin)) s"
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 2
# In place, for this GPU alone: the folder itself becomes importable and nothing is fetched.
# kernels/ is fastbert.kernels only once installed, so a link stands in for the installation.
step build 150 env FASTBERT_CUDA=1 FASTBERT_CUDA_ARCHS="$capability" \
  "$python" setup.py -q build_ext --inplace
[ -e fastbert/kernels ] || ln -s ../kernels fastbert/kernels
step doctor 60 sh -c '"$1" -c "from fastbert.cli import main; main()" doctor --json > "$2/doctor.json"' \
  sh "$python" "$out"
step tests 150 "$python" -m pytest -q -m "gpu and not slow" --no-header -x --maxfail=20 tests
step ops 120 "$python" bench/run.py --device cuda --seconds 0.5 --out "$out/ops_cuda.json"
step model 150 "$python" bench/model.py --device cuda --seconds 4 --dtype bf16 \
  --out "$out/model_cuda.json"

echo "== closing table (whole run: $((SECONDS - start)) s)"
for name in build doctor tests ops model; do
  printf '%-8s %s\n' "$name" "${verdict[$name]}"
done
