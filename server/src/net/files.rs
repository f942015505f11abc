//! Owns room for connections among the files that the process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that the process needs besides connections: listeners, log, models, the runtime.
const RESERVED_FILES: u64 = 32;

/// Raises the limit on open files so that `wanted` connections fit; returns how many do.
pub(crate) fn make_room(wanted: usize) -> usize {
    let needed = wanted as u64 + RESERVED_FILES;
    let limit = getrlimit(Resource::Nofile);
    let is_enough = |soft: Option<u64>| soft.is_none_or(|soft| soft >= needed);
    if is_enough(limit.current) {
        return wanted;
    }
    let raised = limit.maximum.map_or(needed, |hard| hard.min(needed));
    let asked = Rlimit { current: Some(raised), maximum: limit.maximum };
    // What counts is the limit that is there afterwards, whether or not it could be changed.
    let _ = setrlimit(Resource::Nofile, asked);
    let soft = getrlimit(Resource::Nofile).current;
    if is_enough(soft) {
        return wanted;
    }
    let fit = connections_within(soft.unwrap_or(u64::MAX), wanted);
    tracing::warn!(
        wanted,
        open_files = soft,
        reserved = RESERVED_FILES,
        connections = fit,
        "the limit on open files leaves room for fewer connections: raise it (ulimit -n, or \
         LimitNOFILE= in a systemd unit)"
    );
    fit
}

fn connections_within(open_files: u64, wanted: usize) -> usize {
    let fit = open_files.saturating_sub(RESERVED_FILES).max(1);
    usize::try_from(fit).unwrap_or(usize::MAX).min(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_files_mean_fewer_connections_but_never_none() {
        assert_eq!(connections_within(1024, 5000), 1024 - 32);
        assert_eq!(connections_within(40, 5000), 8);
        assert_eq!(connections_within(8, 5000), 1);
        assert_eq!(connections_within(4096, 100), 100);
    }
}
