#!/usr/bin/env bash
# Builds llama.cpp by its number, once, and prints what to give --llmperf-build.
#
#   scripts/build_llama.sh NUMBER|latest [cuda|vulkan|cpu]
#
# NUMBER is a build number, such as 11434; `latest` the highest one that is tagged. Without a
# backend it is cuda where nvidia-smi lists a GPU, else cpu. Needs git, cmake, a C++ compiler, for
# cuda the CUDA toolkit (nvcc), for vulkan glslc and its headers.
#
# Programs go to CACHE/llama.cpp/bNUMBER-BACKEND[-ARCHITECTURES]/bin, all at once when they are
# done; a build that is there is taken. CACHE is LLMPERF_CACHE, else pytest-llmperf in the user's
# cache folder. The path is all that is printed on stdout.
#
#   LLAMA_CPP_REPOSITORY     where to clone from, such as a mirror
#                            (default: https://github.com/ggml-org/llama.cpp)
#   LLAMA_CUDA_ARCHITECTURES such as "90" or "86;120" (default: those of the GPUs that are here)
#   LLAMA_BUILD_JOBS         compilers at a time (default: by cores and free memory)
#   LLAMA_CMAKE_ARGS         more arguments for cmake, separated by blanks. Such a build is another
#                            one: give it another LLMPERF_CACHE
set -euo pipefail

PROGRAMS=(llama-server llama-bench llama-perplexity llama-quantize)
REPOSITORY=${LLAMA_CPP_REPOSITORY:-https://github.com/ggml-org/llama.cpp}
# What nvcc and a C++ compiler took at most while they built ggml differs by version: be generous.
declare -A MIB_PER_JOB=([cuda]=3072 [vulkan]=2048 [cpu]=1536)

say() { printf 'build_llama: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 1
}
refuse() {
    say "$@"
    exit 2
}
usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

newest() {
    local tags
    tags=$(git ls-remote --tags --refs "$REPOSITORY" 'refs/tags/b[0-9]*') ||
        fail "cannot list the tags of $REPOSITORY: name a mirror in LLAMA_CPP_REPOSITORY"
    sed -nE 's|^.*refs/tags/b([1-9][0-9]*)$|\1|p' <<<"$tags" | sort -n | tail -n 1
}

# Capabilities of the GPUs as cmake writes architectures: 9.0 and 12.0 give `90;120`.
architectures() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        sed -nE 's/^ *([0-9]+)\.([0-9]+) *$/\1\2/p' | sort -nu | paste -sd ';' -
}

sees_gpu() { command -v nvidia-smi >/dev/null && [ -n "$(architectures)" ]; }

free_mib() {
    local free limit
    free=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
    # In a container the group's limit is what counts.
    limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || true)
    if [[ $limit =~ ^[0-9]{1,15}$ ]] && ((limit / 1048576 < free)); then
        free=$((limit / 1048576))
    fi
    echo "$free"
}

jobs_for() {
    local backend=$1 cores by_memory
    cores=$(nproc)
    by_memory=$(($(free_mib) / MIB_PER_JOB[$backend]))
    ((by_memory >= 1)) || by_memory=1
    echo $((cores < by_memory ? cores : by_memory))
}

# -- what was asked -----------------------------------------------------------------------------

[[ $# -eq 1 || $# -eq 2 ]] || usage
number=${1#b}
backend=${2:-}
if [ "$number" = latest ]; then
    number=$(newest)
    [ -n "$number" ] || fail "$REPOSITORY has no tag bNUMBER"
    say "the newest is b$number"
fi
[[ $number =~ ^[1-9][0-9]{0,6}$ ]] ||
    refuse "\`$1\` is no build number: write one such as 11434, or latest"
if [ -z "$backend" ]; then
    backend=cpu
    sees_gpu && backend=cuda
fi
[[ -n ${MIB_PER_JOB[$backend]:-} ]] || refuse "no backend \`$backend\`: write cuda, vulkan or cpu"
jobs=${LLAMA_BUILD_JOBS:-$(jobs_for "$backend")}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || refuse "LLAMA_BUILD_JOBS=$jobs is no number of compilers"

name=b$number-$backend
# shellcheck disable=SC2016 # $ORIGIN is the loader's word, not a variable of this shell
arguments=(
    -DCMAKE_BUILD_TYPE=Release
    "-DLLAMA_BUILD_NUMBER=$number"
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    # Libraries are found beside the programs, wherever the folder is moved to; those of the CUDA
    # toolkit where they were linked from. Without them a server would run on the CPU, silently.
    '-DCMAKE_INSTALL_RPATH=$ORIGIN' -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    -DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON
    # Nothing is fetched while it builds: no web page for a browser, no models by URL.
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_CURL=OFF
)
case $backend in
cuda)
    cards=${LLAMA_CUDA_ARCHITECTURES:-$(architectures || true)}
    [ -n "$cards" ] ||
        fail "nvidia-smi lists no GPU to build for: name LLAMA_CUDA_ARCHITECTURES, such as 90"
    [[ $cards =~ ^[0-9]{2,3}[af]?(-real|-virtual)?(\;[0-9]{2,3}[af]?(-real|-virtual)?)*$ ]] ||
        refuse "LLAMA_CUDA_ARCHITECTURES=$cards is no list such as 86;120"
    # The toolkit's packages leave the PATH of services as it was.
    if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
        export CUDACXX=${CUDACXX:-/usr/local/cuda/bin/nvcc}
    fi
    name=$name-${cards//;/-}
    arguments+=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$cards")
    ;;
vulkan) arguments+=(-DGGML_VULKAN=ON) ;;
esac
read -ra more <<<"${LLAMA_CMAKE_ARGS:-}"

cache=${LLMPERF_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/pytest-llmperf}
mkdir -p "$cache/llama.cpp"
cache=$(cd "$cache/llama.cpp" && pwd)
folder=$cache/$name

# -- one at a time, and whole or not at all -----------------------------------------------------

there() {
    if [ -d "$folder" ]; then
        say "$name is there"
        printf '%s\n' "$folder/bin"
        exit 0
    fi
}

# Before the lock: who may not write to the cache folder can take what another one has built.
there
(: >>"$cache/$name.lock") 2>/dev/null ||
    fail "cannot write to $cache: let all who build on this machine write there, or set LLMPERF_CACHE"
exec 9>>"$cache/$name.lock"
if ! flock --nonblock 9; then
    say "another one builds $name: waiting for it"
    flock 9
fi
there
for tool in git cmake; do
    command -v "$tool" >/dev/null || fail "$tool is missing: install it"
done
# Whoever left such a folder behind no longer holds the lock.
rm -rf "$cache/.building-$name-"??????
staging=$(mktemp -d "$cache/.building-$name-XXXXXX")
trap 'rm -rf "$staging"' EXIT

git clone --quiet --depth 1 --branch "b$number" -c advice.detachedHead=false \
    "$REPOSITORY" "$staging/source" >&2 || fail "no tag b$number in $REPOSITORY"
# A shallow clone counts one commit, which is what a build would take for its number.
commit=$(git -C "$staging/source" rev-parse --short=9 HEAD)
arguments+=("-DLLAMA_BUILD_COMMIT=$commit" "${more[@]}")

log=$cache/$name.log
say "building b$number ($commit) for $backend with $jobs compilers; log: $log"
run() {
    "$@" >>"$log" 2>&1 9>&- || {
        tail -n 25 "$log" >&2
        fail "$1 ${2:-} failed; the whole log is $log"
    }
}
: >"$log"
run cmake -S "$staging/source" -B "$staging/build" "${arguments[@]}"
run cmake --build "$staging/build" --config Release --parallel "$jobs" --target "${PROGRAMS[@]}"

# -- is it what was asked for? ------------------------------------------------------------------

mkdir -p "$staging/done"
mv "$staging/build/bin" "$staging/done/bin"
for program in "${PROGRAMS[@]}"; do
    [ -x "$staging/done/bin/$program" ] || fail "the build made no $program; the log is $log"
done
server=$staging/done/bin/llama-server
version=$("$server" --version 2>&1) || fail "the built llama-server does not run: ${version##*$'\n'}"
[[ $version =~ (build |version: )"$number"[^0-9] ]] ||
    fail "the built llama-server calls itself: ${version//$'\n'/ / }"
if [ "$backend" = cuda ] && sees_gpu; then
    devices=$("$server" --list-devices 2>&1) || true
    [[ $devices == *CUDA* ]] ||
        fail "the built llama-server sees no GPU, it would run on the CPU: ${devices//$'\n'/ / }"
fi
printf '%s\n' "build $number" "commit $commit" "backend $backend" "cmake ${arguments[*]}" \
    >"$staging/done/build.txt"
mv -T "$staging/done" "$folder"
say "$name is done"
printf '%s\n' "$folder/bin"
