#!/usr/bin/env bash
# From prompts to drafters for SmolLM2-135M-Instruct: data, features, every kind of drafter at
# equal training, and the table that compares them. Killed, the same command goes on.
#
#   examples/shipped_drafter/recipe.sh [FOLDER] [KIND…]
#
# FOLDER is out/shipped by default; the kinds are those of `options` below, by default all. They
# are trained by KL, or, with -tv behind their name, by total variation.
# Settings from the environment: STEPS, SEED, DRAFT_VOCAB, INITIAL (a drafter of that kind to go on
# from; its draft vocabulary stays), RATE (of learning), COUNT (evaluation prompts per set), SETS,
# NEW_TOKENS (of their answers), BUDGETS (nodes), PROMPTS, their folder (README.md says what it
# holds), and CLOCK: if it is set, the rounds of each kind are timed at the end, which wants a
# quiet machine for some minutes.
# Needs: pip install -e '.[data,plots]'
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-out/shipped}
shift || true
prompts=${PROMPTS:-../shared/prompts}
steps=${STEPS:-1400} seed=${SEED:-0} rate=${RATE:-3e-3}
jaxspec() { "${PYTHON:-python}" -m jaxspec "$@"; }

sizes="--layers 2" ranked="--layers 2 --rank 64"
options() { # what makes each kind; all share data, steps, taps, labels and first weights
  case ${1%-tv} in
    dflash)    echo "$sizes --family dspark --sequential none   --causal False --confidence-head none" ;;
    jetspec)   echo "$sizes --family dspark --sequential none   --causal True  --confidence-head none" ;;
    markov)    echo "$ranked --family dspark --sequential markov --causal False --confidence-head hidden_and_previous" ;;
    rnn)       echo "$ranked --family dspark --sequential rnn    --causal False --confidence-head hidden_and_previous" ;;
    ours)      echo "$ranked --family dspark --sequential rnn    --causal True  --confidence-head hidden_and_previous" ;;
    treeflash) echo "$sizes --family treeflash --block-size 8" ;;
    dflash2 | dflash2-data) echo "$ranked --family dflash2 --block-size 8" ;;
    eagle3)    echo "--family eagle3 --taps 1 8 14 20 27" ;; # the others' taps
    *) echo "unknown kind $1" >&2; return 2 ;;
  esac
}

losses() { # those of DFlash2 are its two published trainers', speculators' and NeMo's
  case $1 in
    dflash2)      echo "--kl 1 --cross-entropy 0 --total-variation 0 --truth target --missing inject --weighting exponential" ;;
    dflash2-data) echo "--kl 0 --cross-entropy 1 --total-variation 0 --truth data --missing skip --weighting exponential" ;;
    eagle3)       echo "" ;; # its own
    *-tv)         echo "--cross-entropy 0.1 --total-variation 0.9 --kl 0 --weighting exponential" ;;
    *)            echo "--kl 1 --cross-entropy 0 --total-variation 0 --weighting exponential" ;;
  esac
}

mkdir -p "$out"
if [ ! -s "$out/data.jsonl" ]; then
  [ -s "$out/prompts.jsonl" ] ||
    "${PYTHON:-python}" examples/shipped_drafter/prompts.py --output "$out/prompts.jsonl"
  jaxspec regenerate --prompts "$out/prompts.jsonl" --output "$out/answers.jsonl" \
    --dtype bfloat16 --rows 64 --max-new-tokens 208 --max-length 382 --question-tokens 64 \
    --temperature 0.7 --sampled 0.2 || [ $? -eq 1 ] # prompts that are too long fail
  # Nothing that an evaluation prompt says may be trained on.
  jaxspec overlap --data "$out/answers.jsonl" --prompts "$prompts"/*.jsonl \
    --clean "$out/data.jsonl" || [ -s "$out/data.jsonl" ]
fi
jaxspec overlap --data "$out/data.jsonl" --prompts "$prompts"/*.jsonl

kinds=("$@")
[ ${#kinds[@]} -gt 0 ] || kinds=(dflash jetspec markov rnn treeflash ours dflash2 dflash2-data eagle3)
decoders=() chains=() trees=()
for kind in "${kinds[@]}"; do
  run=$out/$kind-$seed
  drafter="$(options "$kind") --draft-vocab ${DRAFT_VOCAB:-16384}"
  [ -z "${INITIAL:-}" ] || drafter="--initial $INITIAL"
  # shellcheck disable=SC2086
  [ -s "$run/drafter/config.json" ] ||
    jaxspec train --data "$out/data.jsonl" --features "$out/features" --output "$run" $drafter \
      $(losses "$kind") --max-length 384 --batch-size 8 --anchors 24 \
      --dtype bfloat16 --learning-rate "$rate" --steps "$steps" --checkpoint-every 100 --seed "$seed"

  decoder() { decoders+=("$kind $1=$run/drafter$3,tree=$2,budget=16"); }
  case $kind in dflash | dflash-tv | jetspec*) best=top_budget ;; *) best=path_conditioned ;; esac
  chains+=("$run/drafter,tree=chain") trees+=("$run/drafter,tree=$best")
  decoder chain chain ""
  case $kind in dflash | dflash-tv | jetspec* | markov* | dflash2)
    decoder top_budget top_budget ,head=none ;; # every depth scored by itself, as in DDTree
  esac
  case $kind in jetspec*) decoder best_first best_first ,head=none ;; esac
  case $kind in markov* | treeflash*) decoder transitions transitions "" ;; esac
  [ $best != path_conditioned ] || decoder path_conditioned path_conditioned ""
  case $kind in markov* | treeflash* | eagle3) decoder lookup path_conditioned +ngram ;; esac
done
results=$out/kinds-$seed.jsonl
read -ra sets <<<"${SETS:-gsm8k math500 humaneval mbpp mt-bench}"
sets=("${sets[@]/#/$prompts/}")
read -ra budgets <<<"${BUDGETS:-2 4 8 16 32}"
jaxspec evaluate --prompts "${sets[@]/%/.jsonl}" \
  --count "${COUNT:-8}" --max-new-tokens "${NEW_TOKENS:-256}" \
  --tau-only --budgets "${budgets[@]}" --temperatures 0 1 \
  --decoders "${decoders[@]}" --output "$results" >/dev/null
clocks=()
for nodes in ${CLOCK:+8 16}; do # a chain has 8
  clocks+=("$out/clock-$nodes-$seed.jsonl")
  names=("${trees[@]}")
  [ "$nodes" != 8 ] || names=("${chains[@]}")
  [ -s "${clocks[-1]}" ] ||
    jaxspec bench --prompts "$prompts"/{gsm8k,math500}.jsonl --count 2 --max-new-tokens 96 \
      --dtype bfloat16 --budgets "$nodes" --drafters "${names[@]}" --output "${clocks[-1]}"
done
"${PYTHON:-python}" examples/shipped_drafter/compare.py "$results" ${CLOCK:+--clock "${clocks[@]}"} \
  --output "$out/kinds.png"
