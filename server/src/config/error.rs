//! Owns what is said about a setting that cannot be used, and where its value came from.

use std::fmt;
use std::path::PathBuf;

/// The layer a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A line of the configuration file, counted from 1.
    File {
        /// The file as it was named.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// A variable of the environment.
    Environment {
        /// Its name.
        variable: String,
    },
    /// The command line.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment { variable } => write!(f, "environment {variable}"),
            Self::CommandLine => write!(f, "command line"),
        }
    }
}

/// A setting that cannot be used. The message names it where its value came from, the value and
/// what would be allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    flag: &'static str,
    problem: String,
    origin: Option<Origin>,
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    pub(crate) fn new(flag: &'static str, problem: impl Into<String>) -> Self {
        Self { flag, problem: problem.into(), origin: None }
    }

    /// The flag without its dashes.
    #[must_use]
    pub fn flag(&self) -> &'static str {
        self.flag
    }

    /// The same with the layer that the value came from.
    #[must_use]
    pub(crate) fn in_layer(self, origin: Origin) -> Self {
        Self { origin: Some(origin), ..self }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flag, problem, origin } = self;
        let (key, variable) = (key(flag), variable(flag));
        match origin {
            None => return write!(f, "--{flag}: {problem}"),
            Some(Origin::Default | Origin::CommandLine) => write!(f, "--{flag}: {problem}")?,
            Some(Origin::Environment { variable }) => write!(f, "{variable}: {problem}")?,
            Some(origin @ Origin::File { .. }) => write!(f, "{origin}: {key}: {problem}")?,
        }
        write!(f, "\n  set it with --{flag}, {variable}, or {key} in a configuration file")
    }
}

/// A setting's key in a configuration file.
pub(crate) fn key(flag: &str) -> String {
    flag.replace('-', "_")
}

/// A setting's variable in the environment.
pub(crate) fn variable(flag: &str) -> String {
    format!("{PREFIX}{}", key(flag).to_uppercase())
}

/// What the name of every variable begins with.
pub(crate) const PREFIX: &str = "SLIPSTREAM_";
