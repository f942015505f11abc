//! Owns the parameters of token choice. The function that applies them is in `choice.rs`. Knows no
//! requests: what a client sent is validated by the server before it becomes these values.

use crate::ids::TokenId;

/// How logits become a token. Values are validated at construction by the server; the ranges given
/// here are what `choice.rs` relies on.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Finite, at least 0.
    pub temperature: f64,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest likeliest tokens whose probability reaches this; 1 keeps all. In (0, 1].
    pub top_p: f64,
    /// Keep tokens at least this fraction as likely as the likeliest; 0 keeps all. In [0, 1].
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output
    /// (Keskar et al., CTRL, arXiv 1909.05858, section 4.1); 1 is neutral. Above 0.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens seen in the output; 0 is neutral.
    pub presence_penalty: f64,
    /// Subtracted once per occurrence in the output; 0 is neutral.
    pub frequency_penalty: f64,
    /// Added to logits. Each id at most once.
    pub logit_bias: Vec<(TokenId, f64)>,
    /// Key of the noise.
    pub seed: u64,
    /// Which of several samples of one request this is; part of the noise key.
    pub sample_index: u32,
    /// Output length before which `end_ids` are masked.
    pub min_tokens: usize,
    /// Tokens that end the completion: EOS unless it is ignored, and stop ids.
    pub end_ids: Vec<TokenId>,
}

impl SamplingParams {
    /// Greedy decoding with everything else neutral.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            sample_index: 0,
            min_tokens: 0,
            end_ids: Vec::new(),
        }
    }

    /// Whether any penalty looks at earlier tokens.
    #[must_use]
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}
