#!/usr/bin/env bash
# Run all measurements on a GPU in 9 minutes, packed after every step; run again to go on. See README.md in this folder.
# The first step, calibrate, is also a whole run of its own; the others measure more cases of each engine.
set -euo pipefail
set -m # a step has a process group of its own: Ctrl-C reaches it through this script, once

device=${DEVICE:-cuda}
model=${MODEL:-llama-3.1-8b}
layers=${LAYERS:-}          # bounds and comparisons use the first N layers; default: as many as fit twice
dtypes=${DTYPES:-"bf16 fp8"}
engines=${ENGINES-"vllm hf compile reference"}
seq=${SEQ:-2048}
batch=${BATCH:-1}
sparsity=${SPARSITY:-0.5}
total=${BUDGET:-380}        # seconds of measurement, without start-up, fits and figures
limit=${LIMIT:-540}         # seconds of everything; a step that would exceed it ends early
start_s=${START_S:-12}      # seconds of a step that are no measurement: imports, a fit, figures
read -r -a python <<<"${PYTHON:-python}"
read -r -a prunesim <<<"${PRUNESIM:-${python[*]} -m simulator.cli}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=${here%/tests/gpu}${PYTHONPATH:+:$PYTHONPATH} # nothing needs to be installed
out=${1:-build/gpu-run}
out=${out%/}

mkdir -p "$out/versions"
first=${dtypes%% *}
log=$out/log.txt
echo "== $(date -u +%FT%TZ): $device, $model, $dtypes, engines ${engines:-none}, $total s" >>"$log"

say() { echo "$@" | tee -a "$log"; }

# versions of everything that changes times
version() {
    local file=$out/versions/$1
    shift
    "$@" >"$file" 2>&1 </dev/null || echo "$*: not available" >>"$file"
}
version pip.txt "${python[@]}" -m pip freeze
version torch.txt "${python[@]}" -m torch.utils.collect_env
version gpu.txt nvidia-smi -q
version prunesim.txt "${prunesim[@]}" --version

# a page with links to all results, and one archive without names of this machine; after every step, because a borrowed
# machine may end at any minute
packed() {
    {
        echo "# $model on $device"
        echo
        grep -m 1 '^\(note\|status\): .*; \(torch\|replay\)' "$log" | sed 's/^[a-z]*: //' || true
        echo
        for dtype in $dtypes; do
            [[ -f $out/$dtype/report.md ]] && echo "- [calibration, $dtype]($dtype/report.md), [profile]($dtype/profile.yaml)"
        done
        [[ -f $out/$first/upper_bound.csv ]] && echo "- [measured upper bounds]($first/upper_bound.csv)"
        for table in "$out/$first"/comparison*.md; do
            [[ -f $table ]] && echo "- [predicted against measured: $(basename "$table" .md)](${table#"$out"/})"
        done
        echo "- [log](log.txt), versions of [packages](versions/pip.txt), [torch](versions/torch.txt), [GPU](versions/gpu.txt)"
        echo
        echo "$SECONDS s in all, $failed steps failed."
    } >"$out/report.md"
    "${python[@]}" "$here/pack.py" "$out" "$out.tar.gz" </dev/null
}

child=""
ended() { # at a signal: ask the step to end between two samples, pack what it has measured, and pack again at its end
    trap '' INT TERM HUP
    say "== $1 after $SECONDS s; run the script again to resume"
    if [[ -n $child ]]; then
        kill -INT "$child" 2>/dev/null || true
        packed || true
        for _ in {1..20}; do kill -0 "$child" 2>/dev/null && sleep 1; done
        kill -KILL -- "-$child" 2>/dev/null || true
    fi
    packed || true
    exit 130
}
trap 'ended interrupted' INT
trap 'ended terminated' TERM HUP

# a failed step is reported and counted; later steps still run, because a borrowed machine may not be available again
failed=0
failing() {
    failed=$((failed + 1))
    say "   FAILED with status $1 after $2 s; see $log"
    tail -n 3 "$log" | grep -v FAILED | sed 's/^/   | /' || true
}

step() {
    local name=$1 status=0 begin=$SECONDS left=$((limit - SECONDS)) stop=() size
    shift
    say "== $name: ${prunesim[*]} $*"
    if ((left < 5)); then
        say "   skipped: the time limit of $limit s is reached; run the script again to resume"
        failed=$((failed + 1))
        return 0
    fi
    # SIGINT ends a measurement between two samples, with its records on the disk; a second one would end it at once, so
    # timeout must not send it to the group too
    if command -v timeout >/dev/null; then stop=(timeout --foreground --signal=INT --kill-after=60 "$left"); fi
    size=$(wc -c <"$log")
    ${stop[@]+"${stop[@]}"} "${prunesim[@]}" "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    wait "$child" || status=$?
    child=""
    spend $((SECONDS - begin - start_s))
    # a verdict against a new profile has status 1 too; its measurements are what this run is for
    if ((status == 1)) && grep -q '^Do not ' < <(tail -c "+$((size + 1))" "$log"); then
        say "   done in $((SECONDS - begin)) s; the verdict is not to use the profile, see $log"
    elif ((status == 2)) && grep -q 'not supported by device' < <(tail -c "+$((size + 1))" "$log"); then
        say "   skipped: this device does not have the number format"
    elif ((status == 0)); then say "   done in $((SECONDS - begin)) s"; else failing "$status" "$((SECONDS - begin))"; fi
    packed || failing "$?" "$((SECONDS - begin))"
}

# packages that this machine lacks, and the layers of which a dense and a pruned model fit into its memory
{
    read -r missing
    read -r fitting || true
} < <("${python[@]}" -c "
import sys
from importlib.util import find_spec
print(*(name for name in ('torch', 'transformers', 'vllm') if find_spec(name) is None))
from calibration.runners.in_engine import layers_on
print(layers_on(*sys.argv[1:]))" "$device" "$model" "$first" 2>>"$log" || echo)
layers=${layers:-$fitting}
run=()
for engine in $engines; do
    case $engine in
    hf | compile) package=transformers ;;
    vllm) package=vllm ;;
    *) package=torch ;;
    esac
    if [[ $device == replay:* ]]; then
        say "== compare $engine: skipped, because a replayed device cannot run a model"
    elif [[ " $missing " == *" $package "* ]]; then
        say "== compare $engine: skipped, because $package is not installed"
    else
        run+=("$engine")
    fi
done

# parts of the budget; steps that do not run, or end early, leave theirs to the others
part() {
    case $1 in
    "calibrate $first") [[ $dtypes == "$first" ]] && echo 36 || echo 31 ;; # with one dense and one pruned model
    calibrate*) echo $((4 / others > 0 ? 4 / others : 1)) ;;
    vllm) echo 28 ;; # each of its three models starts in a minute
    hf) echo 9 ;;
    bound) echo 5 ;;
    *) echo 12 ;;
    esac
}
others=$(($(wc -w <<<"$dtypes") - 1))
names=("calibrate $first" ${run[@]+"${run[@]}"} bound)
for dtype in $dtypes; do [[ $dtype == "$first" ]] || names+=("calibrate $dtype"); done
sum=0 # parts of the steps to come
for name in "${names[@]}"; do sum=$((sum + $(part "$name"))); done
# share NAME: set the seconds of a step in "seconds": its part of the time that earlier steps have left
share() {
    seconds=$(awk -v total="$total" -v part="$(part "$1")" -v sum="$sum" 'BEGIN { printf "%.1fs", total * part / sum }')
    sum=$((sum - $(part "$1")))
}
spend() { total=$((total - ($1 > 0 ? ($1 < total ? $1 : total - 1) : 0))); }

cut=()
[[ -n $layers ]] && cut=(--layers "$layers")
shape=(--phase prefill,decode --batch "$batch" --seq "$seq" --sparsity "$sparsity")

# 1. calibrate the first number format: operators, the installed engine's host, one dense and one pruned model
share "calibrate $first"
step "calibrate $first" calibrate "$device" -o "$out/$first" --dtype "$first" --budget "$seconds"
# 2. more prunings in each engine, next to that profile, and the measured upper bound of every family
for engine in ${run[@]+"${run[@]}"}; do
    own=(${cut[@]+"${cut[@]}"})
    [[ $engine == vllm ]] && own+=(--family depth,width) # it starts each pruned model for a minute
    [[ $engine == compile ]] && ((${layers:-99} > 8)) && own=(--layers 8) # torch compiles layer by layer
    share "$engine"
    step "compare $engine" compare "$model" --device "$device" -o "$out/$first" --dtype "$first" \
        --engine "$engine" --budget "$seconds" "${shape[@]}" ${own[@]+"${own[@]}"}
done
share bound
step "upper bound" upper-bound "$model" --device "$device" -o "$out/$first" --dtype "$first" \
    --budget "$seconds" "${shape[@]}" ${cut[@]+"${cut[@]}"}
# 3. the operators of the other number formats
for dtype in $dtypes; do
    [[ $dtype == "$first" ]] && continue
    share "calibrate $dtype"
    step "calibrate $dtype" calibrate "$device" -o "$out/$dtype" --dtype "$dtype" --engine none --budget "$seconds"
done

packed || failed=$((failed + 1))
echo "$out.tar.gz, $out/report.md: $SECONDS s in all, $failed steps failed"
((failed == 0))
