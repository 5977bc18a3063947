#!/usr/bin/env bash
# Run all measurements on a GPU in less than 25 minutes and pack them into one archive; see README.md in this folder.
set -euo pipefail

device=${DEVICE:-cuda}
model=${MODEL:-llama-3.1-8b}
layers=${LAYERS:-}                # bounds and comparisons use the first N layers, for little memory
dtypes=${DTYPES:-"bf16 fp16"}
engines=${ENGINES-"reference hf compile vllm"}
seq=${SEQ:-2048}
batch=${BATCH:-1}
sparsity=${SPARSITY:-0.5}
total=${BUDGET:-1080}             # seconds of measurement, without start-up, fits and figures
limit=${LIMIT:-$((total + 420))}  # seconds of everything; a step that would exceed it ends early
read -r -a python <<<"${PYTHON:-python}"
read -r -a prunesim <<<"${PRUNESIM:-${python[*]} -m simulator.cli}"
here=$(dirname "${BASH_SOURCE[0]}")
out=${1:-gpu-run}
out=${out%/}

mkdir -p "$out/versions"
first=${dtypes%% *}
log=$out/log.txt
echo "== $(date -u +%FT%TZ): $device, $model, $dtypes, engines ${engines:-none}, $total s" >>"$log"

say() { echo "$@" | tee -a "$log"; }

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
        return
    fi
    # SIGINT ends a measurement between two samples, with its records on the disk
    if command -v timeout >/dev/null; then stop=(timeout --signal=INT --kill-after=20 "$left"); fi
    size=$(wc -c <"$log")
    ${stop[@]+"${stop[@]}"} "${prunesim[@]}" "$@" >>"$log" 2>&1 || status=$?
    # a verdict against a new profile has status 1 too; its measurements are what this run is for
    if ((status == 1)) && grep -q '^Do not ' < <(tail -c "+$((size + 1))" "$log"); then
        say "   done in $((SECONDS - begin)) s; the verdict is not to use the profile, see $log"
    elif ((status == 0)); then say "   done in $((SECONDS - begin)) s"; else failing "$status" "$((SECONDS - begin))"; fi
}

# engines that this machine can run
missing=$("${python[@]}" -c "
from importlib.util import find_spec
print(*(name for name in ('torch', 'transformers', 'vllm') if find_spec(name) is None))")
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

# parts of the budget; steps that do not run leave theirs to the others
part() {
    case $1 in
    "calibrate $first") [[ $dtypes == "$first" ]] && echo 37 || echo 25 ;;
    calibrate*) echo 12 ;;
    bound) echo 10 ;;
    reference) echo 15 ;;
    *) echo 13 ;;
    esac
}
others=$(($(wc -w <<<"$dtypes") - 1))
sum=$(($(part "calibrate $first") + (others > 0 ? 12 : 0) + $(part bound)))
for engine in ${run[@]+"${run[@]}"}; do sum=$((sum + $(part "$engine"))); done
share() { awk -v total="$total" -v part="$(part "$1")" -v sum="$sum" -v among="${2:-1}" \
    'BEGIN { printf "%.1fs", total * part / sum / among }'; }

cut=()
[[ -n $layers ]] && cut=(--layers "$layers")
shape=(--phase prefill,decode --batch "$batch" --seq "$seq" --sparsity "$sparsity" ${cut[@]+"${cut[@]}"})

# 1. calibrate every number format: GEMM, 2:4, low-rank pairs, attention, elementwise, launches; fit, validate
for dtype in $dtypes; do
    among=1
    [[ $dtype == "$first" ]] || among=$others
    step "calibrate $dtype" calibrate "$device" -o "$out/$dtype" --dtype "$dtype" \
        --budget "$(share "calibrate $dtype" "$among")"
done
# 2. the measured upper bound of every family, into the run of the first format
step "upper bound" upper-bound "$model" --device "$device" -o "$out/$first" --dtype "$first" \
    --budget "$(share bound)" "${shape[@]}"
# 3. the model, dense and pruned, in each engine, next to the profile of step 1 and the bounds of step 2
for engine in ${run[@]+"${run[@]}"}; do
    step "compare $engine" compare "$model" --device "$device" -o "$out/$first" --dtype "$first" \
        --engine "$engine" --budget "$(share "$engine")" "${shape[@]}"
done

# 4. versions of everything that changes times
version() {
    local file=$out/versions/$1
    shift
    "$@" >"$file" 2>&1 || echo "$*: not available" >>"$file"
}
version pip.txt "${python[@]}" -m pip freeze
version torch.txt "${python[@]}" -m torch.utils.collect_env
version gpu.txt nvidia-smi -q
version prunesim.txt "${prunesim[@]}" --version

# 5. a page with links to all results, and one archive without names of this machine
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

"${python[@]}" "$here/pack.py" "$out" "$out.tar.gz" || failed=$((failed + 1))
echo "$out.tar.gz, $out/report.md: $SECONDS s in all, $failed steps failed"
((failed == 0))
