//! Owns the bounds of what a client may send, each with its unit. `validate.rs` enforces them, the
//! protocol file documents them. Bounds that depend on the model or the operator are in
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
