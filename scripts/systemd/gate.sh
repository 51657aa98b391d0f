#!/usr/bin/env bash
# Gates the newest llama.cpp build on this machine, without any CI service.
#
#   scripts/systemd/gate.sh [BUILD]
#
# BUILD is a number, `latest` (the default) or a build spec. Run it in a folder that has suites/
# and baselines/. It leaves reports/DATE/ there, with reports/latest pointing to the newest,
# prints the closing table and ends as pytest did.
#
#   LLMPERF_PYTHON    the interpreter that has the plugin (default: .venv/bin/python)
#   LLMPERF_BASELINE  what to compare with (default: the newest set of this machine)
#   LLMPERF_MAIL      who gets a mail when it did not pass, by the command `mail`
set -euo pipefail

asked=${1:-latest}
python=${LLMPERF_PYTHON:-.venv/bin/python}
here=$(cd "$(dirname "$0")" && pwd)
report=reports/$(date +%Y-%m-%d-%H%M%S)
mkdir -p "$report"
: >"$report/pytest.txt"

finish() {
    local status=$1 told=$2 name=$3 table
    table=$(sed -n '/^=* llmperf =*$/,$p' "$report/pytest.txt")
    [ -n "$table" ] || table=$(tail -n 30 "$report/pytest.txt")
    printf '%s: %s (exit %s)\n%s\nreport: %s\n' "$name" "$told" "$status" "$table" "$PWD/$report"
    if [ "$status" != 0 ] && [ -n "${LLMPERF_MAIL:-}" ]; then
        printf '%s\n' "$table" | mail -s "llmperf: $name $told" "$LLMPERF_MAIL" ||
            echo "the mail to $LLMPERF_MAIL could not be sent" >&2
    fi
    ln -sfn "$(basename "$report")" reports/latest
    exit "$status"
}

build=$asked
name=$asked
if [[ $asked =~ ^([0-9]+|latest)$ ]]; then
    build=$("$here/../build_llama.sh" "$asked" 2>"$report/pytest.txt") ||
        finish 4 "could not be built" "$asked"
    name=$(basename "$(dirname "$build")")
fi
# What needs several GPUs would fail where only one is to be seen.
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
visible=${CUDA_VISIBLE_DEVICES-all,of,them}
marks="gpu and not multi_gpu"
if [ "$gpus" -gt 1 ] && [[ $visible == *,* ]]; then
    marks=gpu
fi
arguments=(-m "$marks" -n auto "--llmperf-build=$build"
    "--llmperf-report=$report" "--junitxml=$report/junit.xml")
[ -z "${LLMPERF_BASELINE:-}" ] || arguments+=("--baseline=$LLMPERF_BASELINE")
status=0
"$python" -m pytest "${arguments[@]}" >"$report/pytest.txt" 2>&1 || status=$?
case $status in
0) finish 0 "passed" "$name" ;;
1) finish 1 "regressed, or could not be judged" "$name" ;;
*) finish "$status" "was not measured" "$name" ;;
esac
