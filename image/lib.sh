# Shared by the scripts in image/: where the caches are, and how progress is shown.
# Sourced, not run. It knows nothing about mkosi, packages or partitions.
# shellcheck shell=bash

set -euo pipefail

IMAGE_SRC=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd -- "$IMAGE_SRC/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/pandastack
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}

RELEASE=trixie
MKOSI_VERSION=25.3-7
TOOLS=$CACHE/mkosi/tools

step_started=$SECONDS
say() { printf '[%s %3ds] %s\n' "$(basename "$0")" "$((SECONDS - step_started))" "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# quietly LOG COMMAND...: the output goes to LOG; when the command fails, its end is shown.
quietly() {
    local log=$1
    shift
    mkdir -p "$(dirname "$log")"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "failed: $* (whole output: $log)"
    fi
}

# One line on standard output that changes whenever the content of any of the given files or trees does.
fingerprint() {
    local path
    for path in "$@"; do
        if [ -d "$path" ]; then
            (cd "$path" && find . \( -type f -printf '%P %m f\n' -o -type l -printf '%P l %l\n' -o -type d -printf '%P d\n' \) | LC_ALL=C sort
             cd "$path" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum)
        elif [ -e "$path" ]; then
            sha256sum <"$path"
        else
            echo "absent $path"
        fi
    done | sha256sum | cut -d' ' -f1
}

# The machine's own Debian mirrors, one "URI SUITE KIND" per line (KIND: main, security), from the apt
# configuration in force: no host name is written down in this repository.
debian_mirrors() {
    apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v release="$RELEASE" '
            $3 == "main" && $2 ~ /-security$/ && !s++ { print $1, release "-security", "security" }
            $3 == "main" && $2 ~ /-updates$/ && !u++ { print $1, release "-updates", "updates" }
            $3 == "main" && $2 !~ /-/ && !m++ { print $1, release, "main" }'
}

# mkosi, unpacked from the Debian package by image/tools. It needs the system's own Python.
mkosi() {
    local base=$CACHE/tools/mkosi-$MKOSI_VERSION python=/usr/bin/python3
    PYTHONPATH=$base/usr/lib/python3/dist-packages "$python" -B "$base/usr/bin/mkosi" "$@"
}
