//! Owns how sizes and times are written in settings, and read back. Knows no setting.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a time that is not limited is written as.
pub(crate) const OFF: &str = "off";

/// Units of sizes with their bytes, largest first. A plain number is bytes.
const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)];

/// Units of times with their milliseconds, largest first. `ms` is asked before `s` when reading.
const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A size in bytes, written like `512MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteCount(pub u64);

/// A time, written like `30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeSpan(pub Duration);

/// A time, written like `30s`, or `off` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeSpanOrOff(pub Option<Duration>);

/// Text is no size or time. The message says what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be {wanted}, got {got:?}")]
pub struct UnitError {
    wanted: &'static str,
    got: String,
}

impl UnitError {
    fn new(wanted: &'static str, got: &str) -> Self {
        Self { wanted, got: got.to_owned() }
    }
}

impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let parsed = SIZE_UNITS.iter().find_map(|(unit, factor)| {
            let number: u64 = digits(text.strip_suffix(unit)?.trim_end())?;
            number.checked_mul(*factor)
        });
        let wanted = "a size like 512MiB or 2GiB, or a number of bytes";
        parsed.map(Self).ok_or_else(|| UnitError::new(wanted, text))
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_units(f, self.0, &SIZE_UNITS)
    }
}

impl FromStr for TimeSpan {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wanted = "a time with its unit, like 30s, 200ms, 5m or 2h";
        time(text).map(Self).ok_or_else(|| UnitError::new(wanted, text))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_in_units(f, milliseconds(self.0), &TIME_UNITS)
    }
}

impl FromStr for TimeSpanOrOff {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        if text == OFF {
            return Ok(Self(None));
        }
        let wanted = "a time with its unit, like 30s, 200ms, 5m or 2h, or off";
        time(text).map(|time| Self(Some(time))).ok_or_else(|| UnitError::new(wanted, text))
    }
}

impl fmt::Display for TimeSpanOrOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => TimeSpan(time).fmt(f),
            None => f.write_str(OFF),
        }
    }
}

/// Whole milliseconds; what is too long to count is the longest there is.
pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn time(text: &str) -> Option<Duration> {
    TIME_UNITS.iter().rev().find_map(|(unit, factor)| {
        let number = digits(text.strip_suffix(unit)?.trim_end())?;
        Some(Duration::from_millis(number.checked_mul(*factor)?))
    })
}

/// A number of digits alone: `parse` would take a sign, too.
fn digits(text: &str) -> Option<u64> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_plain { text.parse().ok() } else { None }
}

/// In the largest unit that divides it; zero in the last but one, which people use most.
fn write_in_units(
    f: &mut fmt::Formatter<'_>,
    value: u64,
    units: &[(&'static str, u64)],
) -> fmt::Result {
    let divides = units.iter().find(|(_, factor)| value > 0 && value.is_multiple_of(*factor));
    match (divides, units) {
        (Some((unit, factor)), _) => write!(f, "{}{unit}", value / factor),
        (None, [.., (unit, _), _]) => write!(f, "0{unit}"),
        (None, _) => write!(f, "0"),
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteCount, TimeSpan, TimeSpanOrOff};
    use std::time::Duration;

    #[test]
    fn sizes_are_read_with_their_unit_and_written_back() {
        let cases = [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("7", 7), ("1KiB", 1024)];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)));
            assert_eq!(ByteCount(bytes).to_string(), text);
        }
        assert_eq!("1 KiB".parse(), Ok(ByteCount(1024)));
        for text in ["", "MiB", "-1", "+1", "1.5GiB", "1MB", "1 0", "99999999TiB"] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read_with_their_unit_and_written_back() {
        for (text, ms) in [("200ms", 200), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000)] {
            let time = Duration::from_millis(ms);
            assert_eq!(text.parse(), Ok(TimeSpan(time)));
            assert_eq!(text.parse(), Ok(TimeSpanOrOff(Some(time))));
            assert_eq!(TimeSpan(time).to_string(), text);
        }
        assert_eq!(TimeSpan(Duration::ZERO).to_string(), "0s");
        assert_eq!("90s".parse::<TimeSpan>().map(|time| time.to_string()), Ok("90s".to_owned()));
        assert_eq!("off".parse(), Ok(TimeSpanOrOff(None)));
        for text in ["", "30", "s", "off", "-1s", "1.5s", "1s 2ms", "999999999999999999h"] {
            assert!(text.parse::<TimeSpan>().is_err(), "{text}");
        }
    }
}
