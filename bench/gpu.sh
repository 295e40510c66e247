#!/usr/bin/env bash
# What is worth knowing of a GPU at hand, in at most six minutes and nine files of one folder:
#
#     bench/gpu.sh [--dry] [FOLDER]        or OUT=FOLDER bench/gpu.sh; else runs/gpu
#
#     gpu.txt        machine, how each part ended, and what it printed
#     sweep.json     tiles, warps and stages of every pass
#     targets.json   the README's rows: this package, the eager loss, bare products; and the kernels
#                    of each call, which gpu.txt lists
#     jsd.json       those of them that fill the memory
#     long.json      the row of 65,536 tokens
#     logits.json    fused heads that keep float32 logits, beside those that round them
#     host.json      what a call costs the host
#     steps.json     training steps of a whole model
#     chunks.json    time against memory of the fused head, by rows a chunk
#     peers.json     the README's rows again, with whoever else is installed, in the time left
#     more.json      the likeliest words
#     tuning.tgz     where there would be more than eight files: all but rows and steps
#
# In order of importance, by the list of parts below; a part that fails, or runs out of its time,
# leaves the others alone, and what it had measured is kept. Needs torch, Triton, numpy, pytest,
# hypothesis and pytest-benchmark; nothing need be installed of this package. Wheels in .wheels/ are
# unpacked for the time of the run: peers that the machine lacks. With --dry, or without a CUDA
# device, every part runs on tiny inputs on the CPU.
#
#     PARTS    what to run, of those below, in this order
#     TUNE     passes whose tiles are tuned before the rows are measured
#     LIMIT    seconds for everything
#     PYTHON   the interpreter
set -u
cd "$(dirname "$0")/.." || exit 1

# What runs, and what is new and belongs into it: parts in their order; the tests that come first;
# the suites of which the README has rows; and what of them is this package's or its unit.
ALL_PARTS='first head ceilings targets jsd more logits tests host long steps sweep profile chunks peers'
FIRST='compile_on_a_gpu or pytorch_backend_on_a_gpu or fused_head_waits or shorter_gradient
  or float32_logits or kernels_select or measured_rows or launches or tells_its_kernels
  or gather_in_slices'
SUITES='linear_topk_loss linear_opd_loss topk_loss opd_loss full_loss'
MORE='top_k_log_probs linear_top_k_log_probs'
OWN='drift_gate or GEMM'
WHOLE=full_loss  # of it the eager JSD, for which 80 GB are enough if the allocator wastes none
STEPS='layers or eager or drift_gate'

DRY=${DRY:-}
if [ "${1:-}" = --dry ]; then DRY=1; shift; fi
OUT=${1:-${OUT:-runs/gpu}}
PARTS=${PARTS:-$ALL_PARTS}
LIMIT=${LIMIT:-350}
TUNE=${TUNE:-select gather sparse}
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
if compgen -G '.wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SCRATCH/site" \
    .wheels/*.whl && PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$SCRATCH/site"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/drift_gate_triton}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu.txt
SECONDS=0

if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  DRY=1
fi
if [ -n "$DRY" ]; then
  LIMIT=1200  # a busy machine is no reason to fail
  export CUDA_VISIBLE_DEVICES= DRIFT_GATE_KERNELS=off TORCHDYNAMO_DISABLE=1
  export OMP_NUM_THREADS=1  # tiny work, and threads that wait for one another
  GRID=dry QUICK=dry ROUNDS=1 SUITES='rows topk_loss' WORKERS=0 TINY=--small
  SHORT='drift_gate' LONG='drift_gate' ALL='not compile' SWEEP=2 HEAD=2 LOGITS='drift_gate'
  LONG_SUITE=rows CHUNKS='--rows 70 --vocab 99 --width 16 --sizes 32'
  echo "dry run: tiny inputs on the CPU; the times mean nothing"
else
  GRID=targets QUICK=quick ROUNDS=5 WORKERS=8 TINY=
  SHORT="($OWN) and not 65536 and not logits and not jsd" LONG="($OWN) and 65536 and not logits"
  LOGITS="($OWN) and 151936 and not 65536" ALL='not 65536 and not logits' SWEEP=38 HEAD=24
  LONG_SUITE=linear_opd_loss CHUNKS=
fi

# part NAME SECONDS FILE COMMAND...: run it within its time and what is left, print into FILE, and
# say how it ended.
part() {
  local name=$1 limit=$2 file=$3 left=$((LIMIT - SECONDS)) start=$SECONDS signal=TERM code
  shift 3
  case " $PARTS " in *" $name "*) ;; *) return ;; esac
  if [ "$left" -lt 10 ]; then
    echo "== $name: not run, the time is up" | tee -a "$LOG"
    return
  fi
  [ -z "$DRY" ] || limit=$left
  [ "$limit" -lt "$left" ] || limit=$left
  # The suites write what they have on either; pytest alone says what failed on Ctrl-C.
  case $name in first | tests) signal=INT ;; esac
  timeout --signal="$signal" --kill-after=5 "$limit" "$@" >>"$file" 2>&1
  code=$?
  case $code in
    0) echo "== $name: done in $((SECONDS - start)) s" ;;
    124 | 137) echo "== $name: cut short after $limit s" ;;
    *) echo "== $name: exit code $code after $((SECONDS - start)) s" ;;
  esac | tee -a "$LOG"
}

# bench NAME SECONDS GRID CHOSEN SUITE...: measure, into NAME.json, then as text.
bench() {
  local name=$1 limit=$2 grid=$3 chosen=$4 files=() suite
  shift 4
  case " $PARTS " in *" $name "*) ;; *) return ;; esac
  [ "$limit" -lt $((LIMIT - SECONDS)) ] || limit=$((LIMIT - SECONDS))
  for suite in "$@"; do files+=("bench/suites/test_$suite.py"); done
  part "$name" "$limit" "$LOG" "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short \
    "${files[@]}" -k "$chosen" --benchmark-quiet --bench-grid "$grid" --bench-rounds "$ROUNDS" \
    --bench-tiles "$OUT/sweep.json" --bench-budget $((limit - 15)) --bench-out "$OUT/$name.json"
  timeout 30 "$PYTHON" -m drift_gate.bench.summary --no-pictures "$OUT/$name.json" 2>&1 |
    tee -a "$LOG"
}

{
  date
  git rev-parse HEAD
  git status --porcelain
  command -v nvidia-smi >/dev/null && nvidia-smi
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
} >"$LOG" 2>&1

# The functions in C, where they are missing and there is a compiler: while the tests run.
built=
if command -v "${CC:-cc}" >/dev/null && "$PYTHON" -c '
import sys, setuptools
from drift_gate.bench.internals import instruction_set
sys.exit(instruction_set() != "none")' 2>/dev/null; then
  timeout 100 "$PYTHON" setup.py -q build_ext --inplace >/dev/null 2>&1 &
  built=$!
fi

# kernel_tests NAME SECONDS ARGUMENT...: several at a time.
workers=()
[ "$WORKERS" = 0 ] || ! "$PYTHON" -c 'import xdist' 2>/dev/null || workers=(-n "$WORKERS")
kernel_tests() {
  local name=$1 limit=$2
  shift 2
  case " $PARTS " in *" $name "*) ;; *) return ;; esac
  part "$name" "$limit" "$SCRATCH/$name.txt" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -v --tb=short \
    -rf -p no:cacheprovider ${workers[@]+"${workers[@]}"} "$@"
  cat "$SCRATCH/$name.txt" >>"$LOG"
  tail -n 30 "$SCRATCH/$name.txt" | grep -E '^(FAILED|ERROR|=)'
}

# shellcheck disable=SC2086  # words
measure() {
  case $1 in
    first) kernel_tests first 45 tests/test_gpu.py tests/test_bench_device.py tests/test_kernels_*.py \
      -k "$(echo $FIRST)" ;;
    head) part head 45 "$LOG" "$PYTHON" -m drift_gate.bench.sweep $TINY --only $TUNE \
      --seconds "$HEAD" --out "$OUT/sweep.json" ;;
    ceilings) part ceilings 20 "$LOG" "$PYTHON" -m drift_gate.bench.ceilings $TINY ;;
    targets) bench targets 115 "$GRID" "$SHORT" $SUITES ;;
    jsd) PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
      bench jsd 45 "$GRID" "($OWN) and jsd" $WHOLE ;;
    logits) bench logits 45 "$GRID" "$LOGITS" linear_opd_loss linear_full_loss ;;
    tests) kernel_tests tests 100 tests/test_gpu.py tests/test_bench_device.py tests/test_kernels_*.py ;;
    host) bench host 60 "$GRID" 'test_host' host ;;
    long) bench long 40 "$GRID" "$LONG" "$LONG_SUITE" ;;
    steps) bench steps 120 "$GRID" "$STEPS" train_step ;;
    sweep) part sweep 50 "$LOG" "$PYTHON" -m drift_gate.bench.sweep $TINY --add \
      --only scan expand divergence divergence_grad blocks rows topk \
      --seconds "$SWEEP" --out "$OUT/sweep.json" ;;
    profile) part profile 25 "$LOG" "$PYTHON" -m drift_gate.bench.profile_pass \
      --sweep "$OUT/sweep.json" --out "$SCRATCH/profile.txt" ;;
    chunks) part chunks 30 "$LOG" "$PYTHON" -m drift_gate.bench.chunks $CHUNKS \
      --out "$OUT/chunks.json" ;;
    more) bench more 30 "$QUICK" "$OWN" $MORE ;;
    peers) bench peers $((LIMIT - SECONDS > 45 ? LIMIT - SECONDS - 30 : 15)) "$GRID" "$ALL" $SUITES ;;
  esac
}

for one in $PARTS; do
  measure "$one"
  if [ "$one" = first ] && [ -n "$built" ]; then
    wait "$built" && echo "== built the functions in C" >>"$LOG"
  fi
done

# No more than eight files come back from some machines.
if [ "$(find "$OUT" -type f | wc -l)" -gt 8 ]; then
  # shellcheck disable=SC2012
  (cd "$OUT" && ls | grep -xE '(sweep|chunks|logits|jsd|more).json' |
    tar -czf tuning.tgz --remove-files -T -)
fi
echo "== after $SECONDS s, in $OUT: $(cd "$OUT" && echo *)" | tee -a "$LOG"
