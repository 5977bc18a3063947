#!/usr/bin/env bash
# Run all measurements on a GPU in less than ten minutes; see README.md in this folder.
set -euo pipefail

device=${DEVICE:-cuda}
model=${MODEL:-llama-3.1-8b}
layers=${LAYERS:-}                # decoder and bound use the first N layers, for little memory
dtypes=${DTYPES:-"bf16 fp16"}
seq=${SEQ:-2048}
batch=${BATCH:-1}
sparsity=${SPARSITY:-0.5}
total=${BUDGET:-480}              # seconds of measurement, without start-up, fits and figures
read -r -a prunesim <<<"${PRUNESIM:-python -m simulator.cli}"
out=${1:-gpu-run}

mkdir -p "$out"
first=${dtypes%% *}
log=$out/log.txt
: >"$log"

share() { awk -v total="$total" -v part="$1" 'BEGIN { printf "%.1fs", total * part }'; }

# a failed step is reported and counted; later steps still run, because a borrowed machine may not be available again;
# a calibration that ends in "do not use" has the status 1 too, but is no failure
failed=0
step() {
    local name=$1 status=0 lines
    shift
    echo "== $name: ${prunesim[*]} $*" | tee -a "$log"
    local begin=$SECONDS
    lines=$(wc -l <"$log")
    "${prunesim[@]}" "$@" >>"$log" 2>&1 || status=$?
    if ((status == 0)); then
        echo "   done in $((SECONDS - begin)) s" | tee -a "$log"
    elif ((status == 1)) && tail -n "+$((lines + 1))" "$log" | grep -q '^Do not '; then
        echo "   done in $((SECONDS - begin)) s; verdict: do not use this profile" | tee -a "$log"
    else
        failed=$((failed + 1))
        echo "   FAILED with status $status after $((SECONDS - begin)) s; see $log" | tee -a "$log"
        tail -n 3 "$log" | sed 's/^/   | /'
    fi
}

cut=()
[[ -n $layers ]] && cut=(--layers "$layers")
shape=(--phase prefill,decode --batch "$batch" --seq "$seq" --sparsity "$sparsity")

# 1. calibrate every number format: GEMM, 2:4, low-rank pairs, attention, elementwise, launches; fit, and validate on held-out shapes
count=$(wc -w <<<"$dtypes")
for dtype in $dtypes; do
    part=$(awk -v n="$count" -v first="$([[ $dtype == "$first" ]] && echo 1 || echo 0)" \
        'BEGIN { print n == 1 ? 0.5 : first ? 0.32 : 0.18 / (n - 1) }')
    step "calibrate $dtype" calibrate "$device" -o "$out/$dtype" --dtype "$dtype" --budget "$(share "$part")"
done
# 2. the measured upper bound of every family, into the run of the first format
step "upper bound" upper-bound "$model" --device "$device" -o "$out/$first" --dtype "$first" --budget "$(share 0.2)" \
    "${shape[@]}" ${cut[@]+"${cut[@]}"}
# 3. the decoder executed in every family, predicted with the profile of step 1
if [[ $device == replay:* ]]; then
    echo "== decoder: skipped, since a replayed device cannot run it" | tee -a "$log"
else
    step "decoder" compare "$model" --device "$device" -o "$out/$first" --dtype "$first" --budget "$(share 0.3)" \
        "${shape[@]}" ${cut[@]+"${cut[@]}"}
fi

# 4. a page with links to all results
{
    echo "# $model on $device"
    echo
    grep -m 1 '^note: .*; torch\|^note: .*; replay' "$log" | sed 's/^note: //' || true
    echo
    for dtype in $dtypes; do
        [[ -f $out/$dtype/report.md ]] && echo "- [calibration, $dtype]($dtype/report.md), [profile]($dtype/profile.yaml)"
    done
    [[ -f $out/$first/upper_bound.csv ]] && echo "- [measured upper bounds]($first/upper_bound.csv)"
    [[ -f $out/$first/comparison.md ]] && echo "- [predicted against measured]($first/comparison.md)"
    echo "- [log](log.txt)"
    echo
    echo "$SECONDS s in all, $failed steps failed."
} >"$out/report.md"

echo "$out/report.md: $SECONDS s in all, $failed steps failed"
((failed == 0))
