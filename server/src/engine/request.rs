//! Owns what the engine is asked to do: a request that can only be valid. Knows no wire format;
//! `grpc/validate.rs` makes these values out of what clients send.

use slipstream_model::clock::Micros;
use slipstream_model::ids::{SequenceId, TokenId};
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

/// Whose request it is. Tenants share the machine fairly and share no KV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u128);

impl TenantId {
    /// The tenant of this name; the empty name is that of everybody who gives none.
    #[must_use]
    pub fn named(name: &str) -> Self {
        if name.is_empty() {
            return Self::default();
        }
        Self(hash128(name.as_bytes()))
    }
}

/// Who is served first. Within a class, tenants get equal shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for every token.
    Interactive,
    /// Everything else.
    #[default]
    Normal,
    /// Whatever time is left over.
    Batch,
}

impl Priority {
    /// All classes, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Normal, Self::Batch];

    /// Name in metrics and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Normal => "normal",
            Self::Batch => "batch",
        }
    }
}

/// Whether the KV of earlier requests with the same beginning may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixReuse {
    /// Within the tenant, among requests of the same salt.
    Within {
        /// A hash of the client's salt; 0 without one.
        salt: u128,
    },
    /// Never, and nothing of this request is kept for others.
    Off,
}

impl PrefixReuse {
    /// Among requests of this salt; the empty one is that of everybody who gives none.
    #[must_use]
    pub fn salted(salt: &str) -> Self {
        Self::Within { salt: if salt.is_empty() { 0 } else { hash128(salt.as_bytes()) } }
    }
}

/// Among whom KV may be shared: one tenant, one salt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixScope {
    /// The tenant.
    pub tenant: TenantId,
    /// The salt.
    pub salt: u128,
}

impl PrefixScope {
    /// A short form for batches; see `Segment::scope`.
    #[must_use]
    pub fn tag(self) -> u64 {
        let mixed = self.tenant.0 ^ self.salt.rotate_left(64);
        (mixed ^ (mixed >> 64)) as u64
    }
}

/// 128 bits that no two names share.
fn hash128(bytes: &[u8]) -> u128 {
    let hash = blake3::hash(bytes);
    let (head, _) = hash.as_bytes().split_at(16);
    u128::from_le_bytes(head.try_into().expect("16 bytes were split off"))
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
    /// Whose it is.
    pub tenant: TenantId,
    /// How urgent it is.
    pub priority: Priority,
    /// Whether it shares KV with earlier requests. Cannot change the output.
    pub prefix_reuse: PrefixReuse,
    /// A live request with the same prompt, of the same scope, whose KV of the prompt this one may
    /// share as soon as it is computed. Cannot change the output; unknown ids are fine.
    pub sibling: Option<SequenceId>,
}

impl Request {
    /// Positions that the sequence needs at most: every prompt and output token but the last one,
    /// which is never computed, rounded up to it for simplicity.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.prompt.len() + self.max_tokens
    }

    /// Among whom its KV may be shared. A request without reuse has the scope of its tenant, and
    /// shares nothing.
    #[must_use]
    pub fn scope(&self) -> PrefixScope {
        let salt = match self.prefix_reuse {
            PrefixReuse::Within { salt } => salt,
            PrefixReuse::Off => 0,
        };
        PrefixScope { tenant: self.tenant, salt }
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
        /// When a place is likely to be free, from now.
        retry_after: Micros,
    },
    /// The deadline comes before the first token possibly could.
    #[error(
        "the deadline leaves {left_us} us, the prompt alone takes {needed_us} us or more",
        left_us = left.0,
        needed_us = needed.0
    )]
    TooLate {
        /// Time until the deadline.
        left: Micros,
        /// The least time to the first token.
        needed: Micros,
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
