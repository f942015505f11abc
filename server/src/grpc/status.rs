//! Owns the mapping of every error to its gRPC status: one match, no default arm. Knows no fields.

use tonic::{Code, Status};

use crate::engine::event::SequenceFault;
use crate::engine::request::SubmitError;
use crate::grpc::refusal::Refusal;

/// Why a call ends without a completion.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The request is not one that can be served.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine did not take it.
    #[error(transparent)]
    NotTaken(#[from] SubmitError),
    /// The models are not loaded yet.
    #[error("the server is still loading its models: try again")]
    Loading,
    /// Too many requests are being validated at once.
    #[error("{limit} requests are being tokenised already: try again later")]
    EdgeFull {
        /// The bound.
        limit: usize,
    },
    /// The deadline passed.
    #[error("the call's deadline passed")]
    DeadlineExceeded,
    /// The request was cancelled.
    #[error("the request was cancelled")]
    Cancelled,
    /// The server stopped before the request was done.
    #[error(
        "the server stopped before the completion was done: send what you received as \
         output_prefix, with the same seed, to go on elsewhere"
    )]
    ShuttingDown,
    /// This request failed, others did not.
    #[error("the request failed: {0}")]
    Fault(SequenceFault),
    /// The engine thread ended before it could say why: the server is on its way out.
    #[error(
        "the engine has ended before the completion was done: send what you received as \
         output_prefix, with the same seed, to go on elsewhere"
    )]
    EngineGone,
    /// Something that only a defect of the edge explains.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl CallError {
    /// The one place that decides codes.
    fn code(&self) -> Code {
        match self {
            Self::Refused(Refusal::Argument { .. }) | Self::NotTaken(SubmitError::Invalid(_)) => {
                Code::InvalidArgument
            }
            Self::Refused(Refusal::Range { .. })
            | Self::NotTaken(SubmitError::OverContext { .. } | SubmitError::NeverFits { .. }) => {
                Code::OutOfRange
            }
            Self::Refused(Refusal::UnknownModel { .. }) => Code::NotFound,
            Self::NotTaken(SubmitError::QueueFull { .. } | SubmitError::TooManyRequests { .. })
            | Self::EdgeFull { .. } => Code::ResourceExhausted,
            Self::NotTaken(SubmitError::ShuttingDown)
            | Self::Loading
            | Self::ShuttingDown
            | Self::EngineGone => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Fault(_) | Self::Internal(_) => Code::Internal,
        }
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        Status::new(error.code(), error.to_string())
    }
}
