//! Owns the requests that tests make up: seeded, varied, valid. Knows the vocabulary of `pieces`
//! and no engine.

use slipstream_model::clock::Micros;
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, Speculation, TenantId};

use crate::pieces::{END, stop_string};
use crate::random::Rng;

/// A greedy request without stops or limits worth mentioning.
#[must_use]
pub fn plain_request(prompt: Vec<TokenId>, max_tokens: usize) -> Request {
    let params = SamplingParams { end_ids: vec![END], ..SamplingParams::greedy() };
    Request {
        prompt,
        output_prefix: Vec::new(),
        params,
        stop_strings: Vec::new(),
        max_tokens,
        logprobs: false,
        speculation: Speculation::Auto,
        arrival: Micros(0),
        deadline: None,
        tenant: TenantId::default(),
        priority: Priority::Normal,
        prefix_reuse: PrefixReuse::salted(""),
        sibling: None,
    }
}

/// `len` random ids of the vocabulary.
pub fn random_tokens(rng: &mut Rng, vocab_size: usize, len: usize) -> Vec<TokenId> {
    (0..len).map(|_| TokenId(u32::try_from(rng.below(vocab_size)).unwrap())).collect()
}

/// Parameters in which every knob is neutral half of the time or more.
pub fn random_params(rng: &mut Rng, vocab_size: usize) -> SamplingParams {
    let mut params = SamplingParams {
        temperature: *rng.pick(&[0.0, 0.2, 0.8, 1.5]),
        top_k: *rng.pick(&[0, 0, 0, 1, 5]),
        top_p: *rng.pick(&[1.0, 1.0, 0.9, 0.5]),
        min_p: *rng.pick(&[0.0, 0.0, 0.1]),
        repetition_penalty: *rng.pick(&[1.0, 1.0, 1.0, 1.3, 0.8]),
        presence_penalty: *rng.pick(&[0.0, 0.0, 0.5, -0.3]),
        frequency_penalty: *rng.pick(&[0.0, 0.0, 0.4]),
        logit_bias: Vec::new(),
        seed: rng.bits(),
        sample_index: u32::try_from(rng.below(3)).unwrap(),
        min_tokens: *rng.pick(&[0, 0, 0, 3, 12]),
        end_ids: vec![END],
    };
    if rng.one_in(4) {
        params.logit_bias.push((END, *rng.pick(&[2.0, -100.0])));
        params.logit_bias.push((TokenId(1), *rng.pick(&[1.5, -2.0])));
    }
    match rng.below(6) {
        0..=2 => params.end_ids.clear(),
        3 => params.end_ids.push(TokenId(u32::try_from(rng.below(vocab_size)).unwrap())),
        _ => {}
    }
    params
}

/// How large random requests may become.
#[derive(Clone, Copy, Debug)]
pub struct RequestSizes {
    /// Ids to draw from.
    pub vocab_size: usize,
    /// Longest prompt.
    pub prompt_len_max: usize,
    /// Most output tokens.
    pub max_tokens_max: usize,
}

/// A valid request with a bit of everything.
pub fn random_request(rng: &mut Rng, sizes: RequestSizes, pieces: &[Vec<u8>]) -> Request {
    let prompt_len = match rng.below(4) {
        0 => 1,
        1 => rng.between(1, sizes.prompt_len_max),
        // Around the edges of a KV block, where off-by-one errors live.
        2 => (16 * rng.between(1, 3) + rng.between(0, 2) - 1).min(sizes.prompt_len_max),
        _ => rng.between(1, sizes.prompt_len_max.min(12)),
    };
    let params = random_params(rng, sizes.vocab_size);
    let num_stops = *rng.pick(&[0, 0, 0, 0, 1, 3]);
    Request {
        prompt: random_tokens(rng, sizes.vocab_size, prompt_len),
        output_prefix: Vec::new(),
        params,
        stop_strings: (0..num_stops).map(|_| stop_string(rng, pieces)).collect(),
        max_tokens: match rng.below(2) {
            0 => sizes.max_tokens_max,
            _ => rng.between(1, sizes.max_tokens_max),
        },
        logprobs: rng.one_in(2),
        speculation: match rng.below(5) {
            0 => Speculation::Off,
            1 | 2 => Speculation::Auto,
            _ => Speculation::Fixed(rng.between(0, 10)),
        },
        arrival: Micros(0),
        deadline: None,
        tenant: TenantId::default(),
        priority: Priority::Normal,
        prefix_reuse: PrefixReuse::salted(""),
        sibling: None,
    }
}
