#!/usr/bin/env bash
# Runs the scripts of this folder one after the other, what tells most first:
#
#   examples/gpu/campaign.sh [STAGE…]
#
# Stages are check, tiles, steps, replay, small, mosaic, peer and flags; by default all but the
# last two, in 8 to 15 minutes on an H100 with 16 cores. `tiles` measures the kernels' tiles; those
# of products are put where the library reads them, so that later stages run with them. `mosaic`
# times a kernel that has not run on a GPU yet. Stopped or out of time, a stage goes on when the
# script is started again; compiled programs are kept.
#
# Settings from the environment: OUT, the folder of rows (out/gpu); PYTHON; GOLDEN, the folder of
# golden cases; SECONDS_EACH, after which a script begins nothing new (100; `check` has half as
# many more). A script that hangs is killed a minute later. The exit status is 0 only if every
# script's is.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-out/gpu} limit=${SECONDS_EACH:-100} failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/out/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
mkdir -p "$out"

commit() { # of the code alone: `tiles` changes a file of tiles, and rows are found by their commit
  git describe --always || return
  git diff --quiet HEAD -- . ':!pallas_kernels/*/tiles.json' || echo "-dirty"
}
JAXSPEC_COMMIT=${JAXSPEC_COMMIT:-$(commit 2>/dev/null | tr -d '\n')}
export JAXSPEC_COMMIT

run() { # SCRIPT OPTIONS…
  local name=$1
  shift
  echo "== $name $*" >&2
  timeout -k 10 $((limit + 60)) "${PYTHON:-python3}" "examples/gpu/$name.py" \
    --out "$out/$name.jsonl" --seconds "$limit" "$@" || failed=1
}

stage() {
  case $1 in
    check) limit=$((limit * 3 / 2)) run check ${GOLDEN:+--golden "$GOLDEN"} ;;
    tiles)
      rm -f "$out/products.json"
      run products --nodes 64 128 --tiles "$out/products.json"
      [ ! -e "$out/products.json" ] ||
        cp "$out/products.json" pallas_kernels/skinny_matmul/tiles.json
      run tune --kernels triton --nodes 64 256 --tiles "$out/tiles.json" ;;
    steps)
      run steps --profile plain verify64 draft-path_conditioned64
      run steps --model qwen3.5-9b --cases plain verify64 verify256 ;;
    replay) run replay --nodes 64 256 ;;
    small) run small ;;
    mosaic) run tune --nodes 64 256 --tiles "$out/tiles.json" ;; # Triton's rows are known
    peer) run peer ;; # needs torch
    flags) # what XLA does with other options: rows apart, as rows do not say their options
      for flags in "--xla_gpu_enable_pdl=true" "--xla_gpu_exhaustive_tiling_search=true"; do
        local kept=$out
        out=$out/flags$flags
        mkdir -p "$out"
        XLA_FLAGS="${XLA_FLAGS:-} $flags" run steps --cases plain verify64
        out=$kept
      done ;;
    *) echo "unknown stage $1" >&2; failed=2 ;;
  esac
}

[ $# -gt 0 ] || set -- check tiles steps replay small mosaic
for name in "$@"; do stage "$name"; done
exit "$failed"
