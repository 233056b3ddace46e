#!/usr/bin/env bash
# What the shipped drafter gains: tau of every tree at budgets 1 … 128, and the clock. Killed, the
# same command goes on. Needs two quiet cores for three quarters of an hour.
#
#   examples/shipped_drafter/evaluate.sh [DRAFTER] [RESULTS]
#
# DRAFTER is `shipped` by default, a folder or a name; RESULTS the file beside its weights, which
# holds everything already: give another to measure again. Then
# `python -m jaxspec report RESULTS --into docs/results.md` draws its table again.
# Settings from the environment: COUNT and TIMED, prompts per set (TIMED of them against the
# clock); NEW_TOKENS; PROMPTS, their folder (README.md says what it holds).
set -euo pipefail
cd "$(dirname "$0")/../.."
drafter=${1:-shipped}
results=${2:-checkpoints/smollm2-135m/evaluation.jsonl}
prompts=${PROMPTS:-../shared/prompts}

decoders=(lookup=ngram,budget=8,dtype=bfloat16)
decoder() { # NAME TREE NODES [OPTION] [+ngram]
  decoders+=("$1=$drafter${5:-},tree=$2,budget=$3,dtype=bfloat16${4:-}")
}
decoder "chain" chain 8
decoder "DDTree's tree" top_budget 16 ,head=none # every depth scored alone
decoder "JetSpec's tree" best_first 16 ,head=none
decoder "along its chain" top_budget 16 # every depth given the head's own greedy choices
decoder "TreeFlash's tree" transitions 16
decoder "path" path_conditioned 8
decoder "path 16" path_conditioned 16
decoder "path and lookup" path_conditioned 8 "" +ngram
decoder "path and lookup 16" path_conditioned 16 "" +ngram

evaluate() {
  "${PYTHON:-python}" -m jaxspec evaluate \
    --prompts "$prompts"/{gsm8k,math500,humaneval,mbpp,mt-bench}.jsonl \
    --count "${COUNT:-8}" --timed "${TIMED:-3}" --max-new-tokens "${NEW_TOKENS:-256}" \
    --budgets 1 2 4 8 16 32 64 128 --plain-dtypes float32 \
    --decoders "${decoders[@]}" --output "$results" "$@" >/dev/null
}
evaluate # greedy: walks, then the clock
evaluate --tau-only --temperatures 1
