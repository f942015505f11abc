#!/usr/bin/env bash
# Plants each bug of this folder into a copy of the sources and runs the simulator on it. Says how
# many seeds it took to catch it; fails when one is not caught. `PLANTED_SEEDS` bounds the search.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
seeds="${PLANTED_SEEDS:-20000}"
scratch="$(mktemp -d)"
trap 'git -C "$root" worktree remove --force "$scratch/tree"; rm -rf "$scratch"' EXIT
git -C "$root" worktree add --quiet --detach "$scratch/tree" HEAD
# The dependencies are compiled once, beside those of the tree itself.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$root/target}"
missed=0
for patch in "$root"/tests/planted/*.patch; do
    name="$(basename "$patch" .patch)"
    git -C "$scratch/tree" checkout --quiet .
    git -C "$scratch/tree" apply "$patch"
    log="$scratch/$name.log"
    # Built first: a patch that does not compile is not a bug that was caught.
    (cd "$scratch/tree" && cargo test --quiet --release -p slipstream-tests --test slipstream \
        --no-run)
    if (cd "$scratch/tree" && SLIPSTREAM_SIM_SEEDS="$seeds" cargo test --quiet --release \
        -p slipstream-tests --test slipstream simulation -- --nocapture) > "$log" 2>&1; then
        echo "$name: NOT CAUGHT in $seeds seeds"
        missed=1
    elif ! grep -m1 "seeds to fail" "$log" | cut -c1-160 | sed "s/^/$name: /"; then
        tail -5 "$log"
        missed=1
    fi
done
exit "$missed"
