//! Owns what the engine is asked to do: a request that can only be valid. Knows no wire format;
//! `grpc/validate.rs` makes these values out of what clients send.

use slipstream_model::clock::Micros;
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;

/// How many tokens a draft may propose for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speculation {
    /// The engine decides, step by step.
    Auto,
    /// Never propose.
    Off,
    /// Always ask for this draft length; 0 is the same as `Off`.
    Fixed(usize),
}

/// What a client asked, validated. Immutable: the engine's own record is the `Sequence`.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Prompt, at least one token, every id inside the vocabulary.
    pub prompt: Vec<TokenId>,
    /// Output that the client already holds from an earlier call. It counts as output for
    /// penalties, limits and stops, and is not emitted again.
    pub output_prefix: Vec<TokenId>,
    /// How tokens are chosen. `end_ids` are the tokens that end the completion.
    pub params: SamplingParams,
    /// Byte strings that end the completion; none is empty. The text is cut before them.
    pub stop_strings: Vec<Vec<u8>>,
    /// Longest output, `output_prefix` included; at least 1 and within the context.
    pub max_tokens: usize,
    /// Whether every token carries its log-probability.
    pub logprobs: bool,
    /// Draft length policy. Cannot change the output.
    pub speculation: Speculation,
    /// When the request reached the server, before tokenisation.
    pub arrival: Micros,
    /// When the client stops waiting.
    pub deadline: Option<Micros>,
}

impl Request {
    /// Positions that the sequence needs at most: every prompt and output token but the last one,
    /// which is never computed, rounded up to it for simplicity.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.prompt.len() + self.max_tokens
    }
}

/// Why a request was not taken. The engine is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many requests run or wait.
    #[error("the queue is full: {limit} requests run or wait already")]
    QueueFull {
        /// The bound on both together.
        limit: usize,
    },
    /// Too many requests are alive in the whole server.
    #[error("the server already holds its limit of {limit} live requests")]
    TooManyRequests {
        /// The bound on live requests.
        limit: usize,
    },
    /// The request needs more positions than the KV pool has in all.
    #[error("the request needs up to {wanted} positions, the KV pool holds {capacity}")]
    NeverFits {
        /// Positions needed.
        wanted: usize,
        /// Positions of the whole pool.
        capacity: usize,
    },
    /// The request needs more positions than the model's context.
    #[error("prompt and max_tokens need {wanted} positions, the context holds {context_len}")]
    OverContext {
        /// Positions needed.
        wanted: usize,
        /// The context limit.
        context_len: usize,
    },
    /// A token id lies outside the vocabulary, or a list that must not be empty is.
    #[error("the request is not valid: {0}")]
    Invalid(&'static str),
    /// The server is draining or the engine has ended.
    #[error("the server is shutting down")]
    ShuttingDown,
}
