//! Owns the bounds of what a client may send, each with its unit, and the one table of them that
//! the documentation is made from. `validate.rs` enforces them, the protocol file tells them to
//! clients. Bounds that depend on the model or the operator are in
//! [`ServedModel`](crate::grpc::served::ServedModel).

use std::ops::RangeInclusive;

/// One request message, in bytes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Prompt text, in bytes of UTF-8.
pub(crate) const PROMPT_TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Name of a model, in bytes.
pub(crate) const MODEL_NAME_BYTES_MAX: usize = 256;
/// Request id, in visible ASCII characters.
pub(crate) const REQUEST_ID_BYTES_MAX: usize = 128;
/// Name of a tenant, in visible ASCII characters.
pub(crate) const TENANT_BYTES_MAX: usize = 64;
/// Salt of the KV that a request shares, in bytes.
pub(crate) const CACHE_SALT_BYTES_MAX: usize = 128;
/// Samples of one request. Each is a request to the engine, so this is what one call may multiply.
pub(crate) const SAMPLES_MAX: usize = 16;
/// Ids of one abort.
pub(crate) const ABORT_IDS_MAX: usize = 1024;
/// Output tokens of a request that does not say.
pub(crate) const MAX_TOKENS_DEFAULT: usize = 256;
/// Temperatures other than 0. Below the lower bound, logits divided by it overflow.
pub(crate) const TEMPERATURE_RANGE: RangeInclusive<f64> = 0.001..=100.0;
/// Temperature of a request that does not say.
pub(crate) const TEMPERATURE_DEFAULT: f64 = 1.0;
/// Divisor of the logits of tokens seen before.
pub(crate) const REPETITION_PENALTY_RANGE: RangeInclusive<f64> = 0.01..=100.0;
/// Presence and frequency penalties, in units of a logit.
pub(crate) const ADDED_PENALTY_RANGE: RangeInclusive<f64> = -2.0..=2.0;
/// Biases, in units of a logit.
pub(crate) const LOGIT_BIAS_RANGE: RangeInclusive<f64> = -100.0..=100.0;
/// Biased tokens.
pub(crate) const LOGIT_BIAS_ENTRIES_MAX: usize = 1024;
/// Stop strings.
pub(crate) const STOP_STRINGS_MAX: usize = 16;
/// One stop string, in bytes of UTF-8.
pub(crate) const STOP_STRING_BYTES_MAX: usize = 256;
/// Stop token ids.
pub(crate) const STOP_TOKEN_IDS_MAX: usize = 64;

/// A bound as operators and users read about it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// The field of the protocol, or what else is bounded.
    pub(crate) name: &'static str,
    /// What is allowed.
    pub(crate) allowed: Allowed,
    /// What the numbers count.
    pub(crate) unit: &'static str,
    /// What a request beyond it gets.
    pub(crate) beyond: &'static str,
}

/// What a [`Limit`] allows.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Allowed {
    /// At most so many.
    Most(usize),
    /// Both ends included.
    Range(f64, f64),
    /// Zero, or both ends included.
    ZeroOrRange(f64, f64),
    /// What a request has that does not say.
    Default(f64),
}

impl std::fmt::Display for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Most(most) => write!(f, "at most {most}"),
            Self::Range(least, most) => write!(f, "{least} to {most}"),
            Self::ZeroOrRange(least, most) => write!(f, "0, or {least} to {most}"),
            Self::Default(value) => write!(f, "{value} unless given"),
        }
    }
}

/// What a request that is wrong by itself gets.
const REFUSED: &str = "INVALID_ARGUMENT";

const fn most(name: &'static str, most: usize, unit: &'static str) -> Limit {
    Limit { name, allowed: Allowed::Most(most), unit, beyond: REFUSED }
}

const fn range(name: &'static str, range: &RangeInclusive<f64>, unit: &'static str) -> Limit {
    Limit { name, allowed: Allowed::Range(*range.start(), *range.end()), unit, beyond: REFUSED }
}

/// Every bound that the protocol fixes.
pub(crate) const TABLE: &[Limit] = &[
    Limit {
        name: "one request message",
        allowed: Allowed::Most(MESSAGE_BYTES_MAX),
        unit: "bytes, unless `--max-message` says otherwise",
        beyond: "RESOURCE_EXHAUSTED",
    },
    most("text", PROMPT_TEXT_BYTES_MAX, "bytes of UTF-8"),
    most("model", MODEL_NAME_BYTES_MAX, "bytes"),
    most("request_id", REQUEST_ID_BYTES_MAX, "visible ASCII characters, 1 or more"),
    most("request_ids of Abort", ABORT_IDS_MAX, "ids, 1 or more"),
    most("tenant, x-tenant-id", TENANT_BYTES_MAX, "visible ASCII characters"),
    most("cache_salt", CACHE_SALT_BYTES_MAX, "bytes"),
    most("n", SAMPLES_MAX, "samples, 1 or more"),
    Limit {
        name: "max_tokens",
        allowed: Allowed::Default(MAX_TOKENS_DEFAULT as f64),
        unit: "tokens; with the prompt within the context and the KV pool",
        beyond: "OUT_OF_RANGE, beyond the KV pool alone RESOURCE_EXHAUSTED",
    },
    Limit {
        name: "temperature",
        allowed: Allowed::ZeroOrRange(*TEMPERATURE_RANGE.start(), *TEMPERATURE_RANGE.end()),
        unit: "divisor of logits",
        beyond: REFUSED,
    },
    Limit {
        name: "temperature",
        allowed: Allowed::Default(TEMPERATURE_DEFAULT),
        unit: "divisor of logits",
        beyond: "-",
    },
    range("repetition_penalty", &REPETITION_PENALTY_RANGE, "divisor of logits"),
    range("presence_penalty, frequency_penalty", &ADDED_PENALTY_RANGE, "units of a logit"),
    range("logit_bias.bias", &LOGIT_BIAS_RANGE, "units of a logit"),
    most("logit_bias", LOGIT_BIAS_ENTRIES_MAX, "entries, each token once"),
    most("stop_strings", STOP_STRINGS_MAX, "strings"),
    most("one of stop_strings", STOP_STRING_BYTES_MAX, "bytes of UTF-8, 1 or more"),
    most("stop_token_ids", STOP_TOKEN_IDS_MAX, "ids"),
];

#[cfg(test)]
mod tests {
    /// A bound that is not in the table would be missing in the documentation.
    #[test]
    fn every_bound_is_in_the_table() {
        let source = include_str!("limits.rs");
        let (constants, table) = source.split_once("const TABLE").expect("there is a table");
        let names = constants.lines().filter_map(|line| {
            let rest = line.strip_prefix("pub(crate) const ")?;
            rest.split(':').next()
        });
        let names: Vec<&str> = names.collect();
        assert!(names.len() > 10, "{names:?}");
        let missing: Vec<_> = names.iter().filter(|name| !table.contains(**name)).collect();
        assert!(missing.is_empty(), "add them to the table: {missing:?}");
    }
}
