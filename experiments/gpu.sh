#!/usr/bin/env bash
# Everything to measure on a GPU, the most useful first, in one command:
#
#     bash experiments/gpu.sh results/gpu
#
# Each step leaves its output in the folder. A finished step is not run again, and an unfinished one continues where it
# can, so after a stop (Ctrl-C, a time limit) the same command resumes. JOBS models share the GPU in the last step.
# DEVICE=cpu SMALL=1 tries all of it in miniature.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:?usage: bash experiments/gpu.sh FOLDER}
device=${DEVICE:-cuda}
mkdir -p "$results"
git rev-parse HEAD >> "$results/commit.txt" || true
trap 'exit 130' INT TERM # otherwise Ctrl-C would only end the step, and the next one would begin

step() { # step NAME COMMAND...
  local name=$1
  shift
  if [ -e "$results/$name.txt" ]; then return; fi
  echo "== $name: $*"
  if "$@" 2>&1 | tee -i "$results/$name.part"; then
    mv "$results/$name.part" "$results/$name.txt"
  else
    echo "== $name failed; its output is in $results/$name.part" >&2
    failed="${failed:-} $name"
  fi
}

gpt2=(--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --vocab_size=50304 --batch_size=8)
shapes=("" "${gpt2[*]}") budgets=gpu preset=(config/shakespeare_mod.py)
if [ -n "${SMALL:-}" ]; then
  shapes=("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --repeats=1 --warmup=0") budgets=smoke
  preset+=(--max_iters=20 --eval_interval=10 --eval_iters=1)
fi

step check python -m experiments.bench --check --device="$device"
if [ "$device" = cuda ]; then step tests python -m pytest -m gpu; fi

run=$results/shakespeare_mod
if [ -e "$run/last.json" ]; then preset=(--resume); fi
step preset python train.py "${preset[@]}" --device="$device" --out_dir="$run"
if [ -e "$results/preset.txt" ]; then step sample python sample.py --out_dir="$run" --device="$device"; fi

for i in "${!shapes[@]}"; do
  bench=(python -m experiments.bench ${shapes[$i]} --device="$device") # unquoted: each shape is several options
  step "bench-$i" "${bench[@]}" --compile=False
  if [ "$device" = cuda ]; then step "bench-$i-compiled" "${bench[@]}" --compile=True --part=training; fi
done

step isoflop python -m experiments.isoflop "$budgets" --device="$device" --jobs="${JOBS:-8}" \
  --results="$results/isoflop"
if [ -n "${failed:-}" ]; then echo "Failed:$failed"; exit 1; fi
