#!/bin/sh
# Makes a container image out of a llama-server and the libraries it needs, without a build file.
#
#   scripts/container_image.sh LLAMA_SERVER IMAGE [NAME=VALUE...]
#
# LLAMA_SERVER is the program or its folder; IMAGE what the image is to be called, such as
# localhost/llama:b11434; each NAME=VALUE becomes an ENV of the image. The engine is
# LLMPERF_CONTAINER, such as `docker` or `podman --storage-driver=vfs` (default: podman).
#
# The image holds /app/llama-server, the libraries beside it, and what ldd names besides. The
# driver's own libraries (libcuda, libnvidia-*) are left out: the engine brings those of the host.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
program=$1
image=$2
shift 2
[ -d "$program" ] && program=$program/llama-server
if [ ! -x "$program" ]; then
    echo "$program is no program: give llama-server or its folder" >&2
    exit 2
fi
program=$(readlink -f "$program")

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/app" "$root/tmp"
chmod 1777 "$root/tmp"
cp -L "$program" "$root/app/llama-server"
# Links stay links: each library has up to three names.
find "$(dirname "$program")" -maxdepth 1 -name 'lib*.so*' -exec cp -P {} "$root/app/" \;

# Backends are loaded by name, so the libraries beside the program are asked for theirs as well.
for file in "$program" "$root"/app/lib*.so*; do
    # A library that cannot be loaded here may still be loaded there.
    LD_LIBRARY_PATH=$root/app ldd "$file" 2>/dev/null || true
done | sed -n 's/^.*=> \(\/[^ ]*\) (.*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' | sort -u |
    while read -r library; do
        case $library in
        "$root"/* | "$(dirname "$program")"/* | */libcuda.so* | */libnvidia-*) continue ;;
        */ld-linux*) target=$root$library ;;
        *) target=$root/app/$(basename "$library") ;;
        esac
        mkdir -p "$(dirname "$target")"
        cp -L "$library" "$target"
    done

left=$#
while [ "$left" -gt 0 ]; do
    pair=$1
    shift
    set -- "$@" --change "ENV $pair"
    left=$((left - 1))
done
set -- --change 'ENTRYPOINT ["/app/llama-server"]' --change 'ENV LD_LIBRARY_PATH=/app' "$@"
# Both engines read an archive from standard input.
# shellcheck disable=SC2086 # the engine's command has several words
tar -C "$root" -cf - . | ${LLMPERF_CONTAINER:-podman} import "$@" - "$image"
