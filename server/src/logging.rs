//! Owns the log: lines on stderr, for people or as JSON. Nothing of what clients send or receive is
//! ever logged, only ids, counts and times.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{ConfigError, LogFormat};

/// What commands that only pass through log: warnings, and how far a long loading is.
pub(crate) const QUIET: &str = "warn,slipstream_progress=info";

/// What the HTTP/2 library would log as often as any peer likes. A filter that names it wins.
const NOT_FOR_PEERS_TO_FILL: &str = "h2=error";

/// Words that stand for themselves in a filter.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Reads a filter. A word alone has to be a level: as the name of a target it would silence all
/// else.
///
/// # Errors
/// [`ConfigError`] for one that cannot be read.
pub(crate) fn filter(text: &str) -> Result<EnvFilter, ConfigError> {
    let wrong = |problem: String| {
        let advice = "give a level such as info, or targets with levels such as \
                      slipstream_server=debug";
        ConfigError::new("log", format!("{problem}, got {text:?}: {advice}"))
    };
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    let mut words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    if let Some(word) = words.find(|word| !word.contains(['=', '[']) && !is_level(word)) {
        return Err(wrong(format!("{word:?} is no level")));
    }
    EnvFilter::try_new(format!("{NOT_FOR_PEERS_TO_FILL},{text}"))
        .map_err(|error| wrong(error.to_string()))
}

/// Starts logging for the whole process. Later calls change nothing.
///
/// # Errors
/// [`ConfigError`] for a filter that cannot be read.
pub(crate) fn start(format: LogFormat, filter: &str) -> Result<(), ConfigError> {
    let filter = self::filter(filter)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // The only error is that a log runs already.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(())
}
