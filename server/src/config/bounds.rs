//! Owns the range of every setting that is a number, a size or a time: one table, which the checks,
//! the help and the documentation read. Knows no layers.

use std::fmt;
use std::time::Duration;

use super::error::ConfigError;
use super::units::{ByteCount, TimeSpan, milliseconds};

/// What the numbers of a range count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Time,
}

/// The range of one setting, both ends allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// The flag without its dashes.
    pub(crate) flag: &'static str,
    unit: Unit,
    least: u64,
    most: u64,
}

/// Milliseconds of an hour: as good as no target at all for one step.
const HOUR: u64 = 3600 * 1000;
/// Milliseconds of a day: no limit on waiting is longer.
const DAY: u64 = 24 * HOUR;
/// The shortest wait that is still one on a busy machine, in milliseconds.
const MOMENT: u64 = 10;
/// The window that every HTTP/2 stream and connection begins with (RFC 9113, 6.9.2), before any
/// setting arrives: a smaller one would only confuse peers that have used it already.
const WINDOW_LEAST: u64 = 65_535;
/// The largest window of HTTP/2 (RFC 9113, 6.9.1); the library panics beyond it.
const WINDOW_MOST: u64 = (1 << 31) - 1;
/// The least that the HTTP/1 side can read headers with; its library panics below it.
const HEADER_BYTES_LEAST: u64 = 8 << 10;

const fn count(flag: &'static str, least: u64, most: u64) -> Bounds {
    Bounds { flag, unit: Unit::Count, least, most }
}

const fn bytes(flag: &'static str, least: u64, most: u64) -> Bounds {
    Bounds { flag, unit: Unit::Bytes, least, most }
}

const fn time(flag: &'static str, least: u64, most: u64) -> Bounds {
    Bounds { flag, unit: Unit::Time, least, most }
}

/// All ranges.
pub(crate) const BOUNDS: [Bounds; 31] = [
    time("grace", 0, DAY),
    time("step-limit", MOMENT, DAY),
    count("max-connections", 1, 1 << 20),
    count("max-streams", 1, 1 << 16),
    bytes("max-message", 1 << 10, 256 << 20),
    bytes("max-headers", HEADER_BYTES_LEAST, 1 << 20),
    bytes("stream-window", WINDOW_LEAST, WINDOW_MOST),
    bytes("connection-window", WINDOW_LEAST, WINDOW_MOST),
    bytes("send-buffer", 1 << 10, 64 << 20),
    count("max-pending-resets", 1, 1 << 16),
    time("stall-limit", MOMENT, DAY),
    time("stream-stall-timeout", MOMENT, 2 * DAY),
    time("keepalive-interval", 100, DAY),
    time("keepalive-timeout", 100, DAY),
    time("first-request-timeout", MOMENT, DAY),
    time("idle-timeout", MOMENT, 30 * DAY),
    time("max-age", MOMENT, 365 * DAY),
    time("age-grace", MOMENT, DAY),
    count("threads", 1, 256),
    count("context-limit", 2, 1 << 24),
    bytes("load-memory", 1, 1 << 50),
    count("kv-blocks", 1, u32::MAX as u64),
    bytes("kv-memory", 1, 1 << 50),
    // Beyond 8, acceptance is hopeless and verification dear.
    count("draft-len", 0, 8),
    count("max-running", 1, 1 << 16),
    count("max-waiting", 0, 1 << 16),
    count("step-tokens", 1, 1 << 16),
    time("step-target", 1, HOUR),
    count("unread-tokens", 1, 1 << 20),
    count("max-preemptions", 0, 1 << 10),
    time("priority-aging", 1, DAY),
];

/// Range of a setting.
pub(crate) fn of(flag: &str) -> Option<&'static Bounds> {
    BOUNDS.iter().find(|bounds| bounds.flag == flag)
}

/// Largest value of a setting.
pub(super) fn most(flag: &'static str) -> usize {
    let bounds = of(flag).expect("the setting has a range");
    usize::try_from(bounds.most).expect("ranges of counts fit the machine")
}

/// Checks a count.
pub(super) fn check_count(flag: &'static str, value: usize) -> Result<usize, ConfigError> {
    let number = u64::try_from(value).unwrap_or(u64::MAX);
    check(flag, Unit::Count, number).map(|()| value)
}

/// Checks a size.
pub(super) fn check_bytes(flag: &'static str, value: ByteCount) -> Result<u64, ConfigError> {
    check(flag, Unit::Bytes, value.0).map(|()| value.0)
}

/// Checks a time.
pub(super) fn check_time(flag: &'static str, value: Duration) -> Result<Duration, ConfigError> {
    check(flag, Unit::Time, milliseconds(value)).map(|()| value)
}

fn check(flag: &'static str, unit: Unit, value: u64) -> Result<(), ConfigError> {
    let bounds = of(flag).expect("the setting has a range");
    assert!(bounds.unit == unit, "--{flag} is checked as what it is not");
    if (bounds.least..=bounds.most).contains(&value) {
        return Ok(());
    }
    let got = unit.written(value);
    let (least, most) = (unit.written(bounds.least), unit.written(bounds.most));
    Err(ConfigError::new(flag, format!("must be from {least} to {most}, got {got}")))
}

impl Unit {
    fn written(self, value: u64) -> String {
        match self {
            Self::Count => value.to_string(),
            Self::Bytes => ByteCount(value).to_string(),
            Self::Time => TimeSpan(Duration::from_millis(value)).to_string(),
        }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.unit.written(self.least), self.unit.written(self.most))
    }
}

#[cfg(test)]
mod tests {
    use super::{BOUNDS, check};

    #[test]
    fn both_ends_are_allowed_and_nothing_beyond_them() {
        for bounds in BOUNDS {
            let allowed = |value| check(bounds.flag, bounds.unit, value).is_ok();
            assert!(bounds.least < bounds.most, "--{}", bounds.flag);
            assert!(allowed(bounds.least) && allowed(bounds.most), "--{}", bounds.flag);
            assert!(!allowed(bounds.most + 1), "--{}", bounds.flag);
            assert!(bounds.least == 0 || !allowed(bounds.least - 1), "--{}", bounds.flag);
        }
    }
}
