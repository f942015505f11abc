//! Owns why a wire request is not taken before the engine sees it. Knows fields and limits; knows
//! no status codes, which are in `status.rs`.

/// What is wrong with a request. The message names the field, the value and the limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The field is wrong whatever the server's state.
    #[error("{field}: {problem}")]
    Argument {
        /// The field as the protocol names it, with the index of a list's element.
        field: String,
        /// Value and limit.
        problem: String,
    },
    /// The request does not fit the model that is served.
    #[error("{field}: {problem}")]
    Range {
        /// The field as the protocol names it.
        field: String,
        /// Value and limit.
        problem: String,
    },
    /// The request would fit the model, but never the KV pool.
    #[error("{field}: {problem}")]
    Pool {
        /// The field as the protocol names it.
        field: String,
        /// Value and limit.
        problem: String,
        /// Positions needed.
        wanted: usize,
        /// Positions of the whole pool.
        capacity: usize,
    },
    /// Another model is served.
    #[error("model: {wanted:?} is not served here, {served:?} is; leave the field empty to use it")]
    UnknownModel {
        /// What the client asked for.
        wanted: String,
        /// What there is.
        served: String,
    },
}

impl Refusal {
    /// A field that is wrong whatever the server's state.
    pub(crate) fn argument(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Argument { field: field.into(), problem: problem.into() }
    }

    /// A field that does not fit the model that is served.
    pub(crate) fn range(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Range { field: field.into(), problem: problem.into() }
    }
}
