//! Owns what the operating system says about this process. Values that it does not give are absent.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

/// The process at a scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct ProcessReading {
    /// Memory in use that is not swapped out.
    pub(crate) resident_bytes: Option<u64>,
    /// Open file descriptors, the one that this reading needs included.
    pub(crate) num_open_fds: Option<u64>,
}

impl ProcessReading {
    /// Reads `/proc`. Its cost is bounded by the number of open files.
    pub(crate) fn take() -> Self {
        let status = fs::read_to_string("/proc/self/status").ok();
        Self {
            resident_bytes: status.as_deref().and_then(resident_bytes),
            num_open_fds: fs::read_dir("/proc/self/fd").ok().map(|fds| fds.count() as u64),
        }
    }
}

/// The line `VmRSS:   1234 kB` of a process's status.
fn resident_bytes(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Seconds since the beginning of 1970; zero when the machine's date lies before it.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::resident_bytes;

    #[test]
    fn resident_memory_is_read_or_absent() {
        assert_eq!(resident_bytes("VmPeak:\t 9 kB\nVmRSS:\t    1234 kB\n"), Some(1234 * 1024));
        for odd in ["", "VmRSS:", "VmRSS: x kB", "VmRSS: 12 mB", "VmRSS: 18446744073709551615 kB"] {
            assert_eq!(resident_bytes(odd), None, "{odd:?}");
        }
    }
}
