#!/usr/bin/env bash
# Everything worth knowing of a GPU at hand, in at most nine minutes and in one folder:
#
#     bench/gpu.sh [FOLDER]        or OUT=FOLDER bench/gpu.sh
#
# Tests on the device, compute-sanitizer, a sweep over tiles, warps and stages, the benchmarks beside
# whatever peers are installed, profile counters of the slowest pass. A stage that fails, or runs out
# of its time, leaves the others alone; what it had measured is kept and printed.
#
# Needs torch, Triton, numpy, pytest, hypothesis and pytest-benchmark; nothing need be installed of
# this package. Without a CUDA device, or with DRY=1, every stage runs on tiny inputs on the CPU.
#
#     STAGES   what to run (tests sanitizer sweep bench profile)
#     SUITES   files of bench/suites to run, in this order
#     PYTHON   the interpreter
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${1:-${OUT:-bench-gpu}}
PYTHON=${PYTHON:-python}
STAGES=${STAGES:-tests sanitizer sweep bench profile}
LIMIT=${LIMIT:-535}  # seconds for everything
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/drift_gate_triton}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
SECONDS=0

DRY=${DRY:-}
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  DRY=1
fi
if [ -n "$DRY" ]; then
  export CUDA_VISIBLE_DEVICES=
  export DRIFT_GATE_KERNELS=${DRIFT_GATE_KERNELS:-off}
  export OMP_NUM_THREADS=1  # tiny work, and threads that wait for one another
  GRID=dry ROUNDS=2 SUITES=${SUITES:-rows topk_rows}
  echo "dry run: tiny inputs on the CPU; the times mean nothing"
else
  GRID=${GRID:-star} ROUNDS=${ROUNDS:-5}
  SUITES=${SUITES:-opd_loss topk_loss linear_opd_loss linear_topk_loss scan expand full_loss rows
    topk_rows linear_full_loss linear_token_log_probs linear_gather_lse}
fi

# stage NAME SECONDS COMMAND...: run it within its time and what is left, and say how it ended.
stage() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS code
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "$name: not run, the time is up" | tee -a "$OUT/stages.txt"
    return
  fi
  [ -z "$DRY" ] || limit=300  # a busy machine is no reason to fail
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  case $code in
    0) echo "$name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "$name: cut short after $limit s" ;;
    *) echo "$name: exit code $code, see $name.log" ;;
  esac | tee -a "$OUT/stages.txt"
  tail -n "${TAIL:-15}" "$OUT/$name.log"
}

wanted() { case " $STAGES " in *" $1 "*) return 0 ;; esac; return 1; }

: >"$OUT/stages.txt"
{
  date
  git rev-parse HEAD 2>/dev/null
  git status --porcelain 2>/dev/null
  command -v nvidia-smi >/dev/null && nvidia-smi
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
} >"$OUT/machine.txt" 2>&1

if wanted tests; then
  workers=
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers='-n 4'
  stage test_gpu 60 "$PYTHON" -m pytest -v -p no:cacheprovider tests/test_gpu.py
  if [ -z "$DRY" ]; then
    # shellcheck disable=SC2086  # two words, or none
    stage test_kernels 70 "$PYTHON" -m pytest -v -p no:cacheprovider $workers \
      tests/test_kernels_*.py
  fi
fi

if wanted sanitizer; then
  if command -v compute-sanitizer >/dev/null && [ -z "$DRY" ]; then
    for tool in memcheck racecheck; do
      stage "sanitizer_$tool" 30 compute-sanitizer --tool "$tool" --target-processes all \
        "$PYTHON" -m drift_gate.bench.sweep --small --seconds 0 --out "$OUT/sanitizer.json"
    done
  else
    stage small_shapes 40 "$PYTHON" -m drift_gate.bench.sweep --small --seconds 0 \
      --out "$OUT/small_shapes.json"
    echo "sanitizer: left out, no compute-sanitizer or no GPU" | tee -a "$OUT/stages.txt"
  fi
fi

if wanted sweep; then
  seconds=85
  [ -z "$DRY" ] || seconds=5
  TAIL=40 stage sweep 105 "$PYTHON" -m drift_gate.bench.sweep --seconds "$seconds" \
    --out "$OUT/sweep.json"
fi

if wanted bench; then
  files=
  for suite in $SUITES; do files="$files bench/suites/test_$suite.py"; done
  # shellcheck disable=SC2086  # words
  TAIL=3 stage bench 215 "$PYTHON" -m pytest -q -p no:cacheprovider $files \
    --bench-grid "$GRID" --bench-rounds "$ROUNDS" --bench-budget 195 \
    --bench-out "$OUT/results.json" --benchmark-json "$OUT/pytest_benchmark.json"
  TAIL=400 stage summary 40 "$PYTHON" -m drift_gate.bench.summary "$OUT/results.json"
fi

if wanted profile; then
  TAIL=30 stage profile 45 "$PYTHON" -m drift_gate.bench.profile_pass --sweep "$OUT/sweep.json" \
    --out "$OUT/profile.txt"
  if command -v ncu >/dev/null && [ -z "$DRY" ]; then
    TAIL=80 stage ncu 45 ncu --set full --target-processes all --launch-count 2 \
      --kernel-name 'regex:^_(scan|expand|entries|divergence|divergence_grad)$' \
      "$PYTHON" -m drift_gate.bench.profile_pass --plain --sweep "$OUT/sweep.json"
  fi
fi

echo "== after $SECONDS s, in $OUT:"
cat "$OUT/stages.txt"
