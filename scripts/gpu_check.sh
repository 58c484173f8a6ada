#!/usr/bin/env bash
# Everything that a machine with a GPU is needed for: the tests, one whole run, the benchmarks beside their peers.
# Without vLLM rollouts are sampled by transformers. Usage: bash scripts/gpu_check.sh OUT [STEP ...]
#
# Every step has a log OUT/STEP.log and, where it measures, OUT/STEP.json; one that fails does not stop the others.
set -u
out=${1:?usage: bash scripts/gpu_check.sh OUT [STEP ...]}
shift
mkdir -p "$out"
python=${PYTHON:-python3}
student=$out/run/quickstart/student
all=(tests loss train_step run decode audit)
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 6)

tests() {  # those marked gpu, and those whose parts go to a GPU wherever there is one
    timeout 600 "$python" -m pytest -q -rf --tb=short -p no:cacheprovider "${parallel[@]}" -m "gpu or not slow" \
        tests/test_engine_devices.py tests/test_verify.py tests/test_stages.py tests/test_heldout.py \
        tests/test_panel.py tests/test_generate.py tests/test_run.py
}
loss() {
    timeout 120 "$python" -m benchmarks.loss --loss reverse_kl --tokens 8192 --vocab 49152 --repeat 20 --json "$out/loss.json"
}
train_step() {  # passes as large as a GPU likes them, for both sides
    timeout 300 "$python" -m benchmarks.train_step --repeat "${REPEAT:-3}" --steps 6 \
        --token-budget 16384 --micro-batch 32 --json "$out/train_step.json"
}
run() {
    timeout 600 "$python" -m onpolicy.train --config configs/quickstart.yaml --output_dir "$out/run" \
        --rollouts.engine transformers --batching.token_budget 16384 --logging.trackers "[]" \
        && cp "$out/run/quickstart/summary.json" "$out/run.json"
}
decode() {
    timeout 600 "$python" -m benchmarks.decode --draft "$student" --only ours.plain ours.draft ours.ngram "transformers.*" \
        --temperatures 1 --batches 1 8 --prompts 8 --tokens 64 --draft-length 3 --repeat 3 --json "$out/decode.json"
}
audit() {
    timeout 600 "$python" -m spec.audit --engine torch --target "$("$python" -m onpolicy.teachers.convert | tail -n 1)" \
        --draft "$student" --max-tokens-audited 20000 --json "$out/audit.json"
}

failed=0
for step in "${@:-${all[@]}}"; do
    began=$SECONDS
    "$step" >"$out/$step.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "== $step: exit $code, $((SECONDS - began)) s"
    tail -n 25 "$out/$step.log"
done
exit $failed
