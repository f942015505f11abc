# What CI runs, and what a change must pass before it is submitted.

# everything: format, lints, docs, dependencies, tests
check: fmt clippy docs deny test

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --release --workspace --all-targets -- -D warnings

docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps

deny:
    cargo deny check

test:
    cargo test --release --workspace

# long simulation; `just sim 100000` or `just sim --seeds 100000`
sim *seeds:
    #!/usr/bin/env bash
    set -euo pipefail
    words="{{seeds}}"
    words="${words#--seeds}"
    words="${words#=}"
    words="${words// /}"
    SLIPSTREAM_SIM_SEEDS="${words:-10000}" cargo test --release -p slipstream-tests simulation -- --nocapture

# what the simulator catches: each planted bug, and the number of seeds it took
planted:
    tests/planted/run.sh

# single stream, plain beside draft lengths 1 to 8
bench:
    cargo bench -p slipstream-benches --bench single_stream

# plain beside drafts that agree never, half the time and always, at the cost of real networks
bench-constructed:
    cargo bench -p slipstream-benches --bench constructed

# cost of the wire: the same load in-process and over gRPC
bench-wire:
    cargo bench -p slipstream-benches --bench wire

# floods beside clients that notice, with their table; `just floods 5` seconds each
floods seconds="1":
    SLIPSTREAM_FLOOD_SECONDS={{seconds}} cargo test --release -p slipstream-tests floods -- --nocapture

# clients that come and go as they like; `just unruly 3000`
unruly clients="1000":
    SLIPSTREAM_UNRULY_CLIENTS={{clients}} cargo test --release -p slipstream-tests unruly -- --nocapture
