//! Owns the error of loading a model. Knows no file format: the places and reasons are filled in by
//! the loaders, and always name the file's own key or tensor.

use std::path::PathBuf;

/// Characters of an untrusted name that an error message repeats.
const SHOWN_CHARS: usize = 80;

/// Why a model could not be loaded. Nothing stays allocated when it is returned.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// Something is larger than any sound file has it.
    #[error("{what} has {size} {unit}; the limit is {limit}")]
    TooLarge {
        /// The file, key or tensor.
        what: String,
        /// Its size.
        size: u64,
        /// What the size counts.
        unit: &'static str,
        /// The largest size accepted.
        limit: u64,
    },
    /// Loading would take more memory than the operator granted.
    #[error("{what} needs about {needed_bytes} bytes of memory; the budget is {budget_bytes}")]
    OverBudget {
        /// What needs it.
        what: String,
        /// Estimate of the peak while loading.
        needed_bytes: u64,
        /// [`LoadOptions::memory_budget_bytes`](crate::load::LoadOptions::memory_budget_bytes).
        budget_bytes: u64,
    },
    /// The system has not got the memory.
    #[error("no memory for {what}: {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes asked for.
        bytes: u64,
    },
    /// Something that every such model has is absent.
    #[error("{what} is missing")]
    Missing {
        /// The file, key or tensor.
        what: String,
    },
    /// The file contradicts its own format.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// The file, key or tensor.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is sound but asks for something that would have to be ignored to go on.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The key or tensor.
        what: String,
        /// What would be supported.
        reason: String,
    },
    /// Two parts of the model disagree.
    #[error("{what} does not fit the model: {reason}")]
    Mismatch {
        /// The key or tensor.
        what: String,
        /// The disagreement.
        reason: String,
    },
}

impl LoadError {
    pub(crate) fn missing(what: impl Into<String>) -> Self {
        Self::Missing { what: what.into() }
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Malformed { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn mismatch(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Mismatch { what: what.into(), reason: reason.into() }
    }

    /// An error of candle on one tensor that our own checks had accepted.
    pub(crate) fn candle(name: &str, error: &candle_core::Error) -> Self {
        Self::malformed(tensor(name), shown(&error.to_string()))
    }
}

/// How messages call a tensor.
pub(crate) fn tensor(name: &str) -> String {
    format!("tensor `{}`", shown(name))
}

/// Untrusted text made fit for a message: escaped and cut.
pub(crate) fn shown(text: &str) -> String {
    let mut escaped: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        escaped.push_str("...");
    }
    escaped
}
