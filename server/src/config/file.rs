//! Owns the configuration file: one flat TOML table of settings, bounded, and refused with the line
//! where it is wrong. Knows no flags of commands.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Arg, Command};
use toml::de::{DeTable, DeValue};

use super::error::{Origin, key};
use super::flags::CONFIG_FLAG;
use super::setting::{Kind, Setting};

/// Largest configuration file, in bytes.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << 20;
/// How alike a known name has to be to be suggested, from 0 to 1.
const ALIKE: f64 = 0.8;
/// Characters of a value that a message repeats.
const SHOWN_CHARS_MAX: usize = 60;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// It cannot be read.
    #[error("--config: cannot read {}: {error}", path.display())]
    Unreadable {
        /// As it was named.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is no file of text within the bound.
    #[error("--config: {} {problem}", path.display())]
    NoSettings {
        /// As it was named.
        path: PathBuf,
        /// What it is instead.
        problem: String,
    },
    /// A line of it is wrong.
    #[error("{origin}: {problem}")]
    Line {
        /// Where.
        origin: Origin,
        /// What.
        problem: String,
    },
}

/// One setting of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its key.
    pub(crate) key: String,
    /// Its value as it would be written behind a flag.
    pub(crate) text: String,
    /// Where it stands.
    pub(crate) origin: Origin,
}

/// Reads a file. `settings` are the keys there are.
///
/// # Errors
/// [`FileError`] for the first thing that is wrong.
pub(crate) fn read(path: &Path, settings: &[Setting]) -> Result<Vec<Entry>, FileError> {
    parse(path, &text(path)?, settings)
}

fn text(path: &Path) -> Result<String, FileError> {
    let unreadable = |error| FileError::Unreadable { path: path.to_owned(), error };
    let wrong = |problem: String| FileError::NoSettings { path: path.to_owned(), problem };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.is_dir() {
        return Err(wrong("is a folder: name the file in it".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(format!("has more than {FILE_BYTES_MAX} bytes: is it the right file?")));
    }
    String::from_utf8(bytes).map_err(|_| wrong("is not UTF-8 text: is it the right file?".into()))
}

fn parse(path: &Path, text: &str, settings: &[Setting]) -> Result<Vec<Entry>, FileError> {
    let origin = |offset: usize| Origin::File { path: path.to_owned(), line: line(text, offset) };
    let table = DeTable::parse(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        let problem = format!("this is not TOML: {}", error.message().replace('\n', "; "));
        FileError::Line { origin: origin(offset), problem }
    })?;
    let mut entries = Vec::new();
    for (name, value) in table.get_ref() {
        let origin = origin(name.span().start);
        let entry = entry(name.get_ref(), value.get_ref(), settings);
        match entry {
            Ok((key, text)) => entries.push(Entry { key, text, origin }),
            Err(problem) => return Err(FileError::Line { origin, problem }),
        }
    }
    Ok(entries)
}

/// Key and value, or what is wrong with them.
fn entry(
    name: &str,
    value: &DeValue<'_>,
    settings: &[Setting],
) -> Result<(String, String), String> {
    let Some(setting) = settings.iter().find(|setting| setting.key == name) else {
        return Err(unknown(name, value, settings));
    };
    let text = value_text(value, &setting.kind).ok_or_else(|| {
        let got = format!("{} {}", article(value.type_str()), shown(value));
        format!("{name}: must be {}, got {}", setting.kind.wanted(), got.trim_end())
    })?;
    Ok((setting.key.clone(), text))
}

/// The value as text, if it has the type that the setting wants.
fn value_text(value: &DeValue<'_>, kind: &Kind) -> Option<String> {
    let integer = || {
        let integer = value.as_integer()?;
        i64::from_str_radix(integer.as_str(), integer.radix()).ok()
    };
    match kind {
        Kind::Integer => Some(u64::try_from(integer()?).ok()?.to_string()),
        Kind::Boolean => Some(value.as_bool()?.to_string()),
        Kind::Size => match value.as_str() {
            Some(text) => Some(text.to_owned()),
            None => Some(u64::try_from(integer()?).ok()?.to_string()),
        },
        Kind::Time | Kind::TimeOrOff | Kind::Choice(_) | Kind::Text => {
            value.as_str().map(str::to_owned)
        }
    }
}

/// A scalar value as a message repeats it.
fn shown(value: &DeValue<'_>) -> String {
    let text = match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(is) => is.to_string(),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => String::new(),
    };
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn article(noun: &str) -> String {
    let is_vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {noun}", if is_vowel { "an" } else { "a" })
}

fn unknown(name: &str, value: &DeValue<'_>, settings: &[Setting]) -> String {
    let name: String = name.chars().take(SHOWN_CHARS_MAX).collect();
    if value.is_table() {
        return format!(
            "{name}: there are no tables: all keys stand at the top level, without [{name}] above \
             them"
        );
    }
    if name == CONFIG_FLAG {
        return "config: a configuration file cannot name another one".to_owned();
    }
    let keys: Vec<&str> = settings.iter().map(|setting| setting.key.as_str()).collect();
    match nearest(&key(&name), &keys) {
        Some(near) => format!("there is no setting {name}; did you mean {near}?"),
        None => format!("there is no setting {name}; there are: {}", keys.join(", ")),
    }
}

/// The known name that is most like this one, if one is like it at all.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = |other: &&str| strsim::jaro_winkler(name, other);
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) >= ALIKE).then_some(*best)
}

fn line(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

/// Reads each value as its flag would, so that what is wrong is told with the line it stands in.
///
/// # Errors
/// [`FileError::Line`] for the first value that the flag would not take.
pub(crate) fn check_value(entry: &Entry, arg: &Arg) -> Result<(), FileError> {
    let flag = arg.get_long().expect("a setting has a flag");
    let alone = arg.clone().env(clap::builder::Resettable::Reset);
    let command = Command::new("file").no_binary_name(true).arg(alone);
    let result = command.try_get_matches_from([format!("--{flag}={}", entry.text)]);
    let Err(error) = result else { return Ok(()) };
    let values: Vec<_> = arg.get_possible_values();
    let names: Vec<&str> = values.iter().map(clap::builder::PossibleValue::get_name).collect();
    let reason = match std::error::Error::source(&error) {
        Some(reason) => reason.to_string(),
        None => format!("must be one of {}, got {:?}", names.join(", "), entry.text),
    };
    let problem = format!("{}: {reason}", entry.key);
    Err(FileError::Line { origin: entry.origin.clone(), problem })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Entry, parse};
    use crate::config::setting;

    fn read(text: &str) -> Result<Vec<Entry>, String> {
        parse(Path::new("f.toml"), text, &setting::all()).map_err(|error| error.to_string())
    }

    #[test]
    fn values_of_all_types_are_read() {
        let text = "# a comment\nmax_running = 0x10\ngzip = true\nkv_memory = 1_024\n\
                    grace = '5s'\nlog_format = \"json\"\nload_memory = \"2GiB\"\n";
        let entries = read(text).expect("valid");
        let mut pairs: Vec<_> = entries.iter().map(|e| (e.key.as_str(), e.text.as_str())).collect();
        pairs.sort_unstable();
        let expected = [
            ("grace", "5s"),
            ("gzip", "true"),
            ("kv_memory", "1024"),
            ("load_memory", "2GiB"),
            ("log_format", "json"),
            ("max_running", "16"),
        ];
        assert_eq!(pairs, expected);
        let gzip = entries.iter().find(|entry| entry.key == "gzip").expect("read");
        assert_eq!(gzip.origin.to_string(), "f.toml:3");
    }

    #[test]
    fn wrong_files_name_line_key_and_value() {
        let cases = [
            ("\nmax_runing = 3", "f.toml:2: there is no setting max_runing; did you mean max_run"),
            ("max-running = 3", "did you mean max_running?"),
            ("zzz = 3", "there are: listen, "),
            ("[server]\nlisten = 'a:1'", "f.toml:1: server: there are no tables"),
            (
                "max_running = '3'",
                "max_running: must be an integer of 0 or more without quotes, got",
            ),
            ("max_running = -3", "got an integer -3"),
            ("max_running = 1.5", "got a float 1.5"),
            ("max_running = 99999999999999999999", "got an integer 99999999999999999999"),
            ("gzip = 'yes'", "gzip: must be true or false without quotes, got a string \"yes\""),
            ("grace = 30", "grace: must be a time with its unit, like \"30s\", got an integer 30"),
            ("listen = ['a:1']", "listen: must be a text in quotes, got an array"),
            ("a = ", "f.toml:1: this is not TOML"),
            ("gzip = true\ngzip = true", "f.toml:2: this is not TOML: duplicate key"),
            ("config = 'x'", "cannot name another"),
        ];
        for (text, message) in cases {
            let error = read(text).expect_err(text);
            assert!(error.contains(message), "{text:?}: {error}");
        }
    }
}
