#!/usr/bin/env bash
# What a change of size, data or steps does to tau: one drafter each, all else as in `base`.
# Killed, the same command goes on. After `recipe.sh FOLDER markov`, whose data, features and
# drafter of 1,400 steps it uses:
#
#   examples/shipped_drafter/curves.sh [FOLDER] [DRAFTER…]
#
# FOLDER is out/shipped by default; the drafters are those of `options` below, by default all.
# Settings from the environment: STEPS, SEED, COUNT (evaluation prompts per set), SETS,
# NEW_TOKENS (of their answers), and PROMPTS, their folder (README.md says what it holds).
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/shipped}
shift || true
prompts=${PROMPTS:-../shared/prompts}
steps=${STEPS:-500} seed=${SEED:-0}
jaxspec() { "${PYTHON:-python}" -m jaxspec "$@"; }

options() { # what differs from `base`
  case $1 in
    base)       echo "" ;;
    layers-*)   echo "--layers ${1#layers-}" ;;
    taps-1)     echo "--taps 27" ;; # of 1 8 14 20 27
    taps-3)     echo "--taps 1 14 27" ;;
    vocab-*)    echo "--draft-vocab ${1#vocab-}" ;;
    rank-*)     echo "--rank ${1#rank-}" ;;
    data-*)     echo "--steps 1400" ;; # every NUMBER-th conversation, as long as `long`
    *) echo "unknown drafter $1" >&2; return 2 ;;
  esac
}

names=("$@")
[ ${#names[@]} -gt 0 ] ||
  names=(base layers-1 layers-3 taps-1 taps-3 vocab-4096 vocab-32768 rank-16 data-4 data-16)
long=$out/markov-$seed/drafter decoders=() # 1,400 steps, if there is one of this seed
[ ! -s "$long/config.json" ] ||
  decoders=("long path=$long,tree=path_conditioned,budget=16" "long chain=$long,tree=chain")
for name in "${names[@]}"; do
  run=$out/curves/$name-$seed data=$out/data.jsonl features=$out/features
  if [[ $name = data-* ]]; then
    data=$out/curves/$name.jsonl features=$out/curves/$name-features
    mkdir -p "$out/curves"
    awk "NR % ${name#data-} == 1" "$out/data.jsonl" >"$data"
  fi
  # shellcheck disable=SC2046
  [ -s "$run/drafter/config.json" ] ||
    jaxspec train --data "$data" --features "$features" --output "$run" --family dspark \
      --sequential markov --causal False --confidence-head hidden_and_previous --layers 2 --rank 64 \
      --draft-vocab 16384 --kl 1 --cross-entropy 0 --total-variation 0 --weighting exponential \
      --max-length 384 --batch-size 8 --anchors 24 --dtype bfloat16 --learning-rate 3e-3 \
      --steps "$steps" --checkpoint-every 100 --seed "$seed" $(options "$name")
  decoders+=("$name path=$run/drafter,tree=path_conditioned,budget=16"
    "$name chain=$run/drafter,tree=chain")
done
read -ra sets <<<"${SETS:-gsm8k math500 humaneval mbpp mt-bench}"
sets=("${sets[@]/#/$prompts/}")
jaxspec evaluate --prompts "${sets[@]/%/.jsonl}" \
  --count "${COUNT:-8}" --max-new-tokens "${NEW_TOKENS:-128}" --tau-only --temperatures 0 \
  --decoders "${decoders[@]}" --output "$out/curves-$seed.jsonl" >/dev/null
