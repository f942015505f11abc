//! Owns the oracle: one sequence, a forward of its own, one row per forward pass, no batch and no
//! speculation. It shares the function that chooses a token with the product and nothing else:
//! ends, stops, limits and text are written a second time here, as plainly as possible, over whole
//! byte strings.

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, Chooser, log_probability};
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_server::engine::event::{FinishReason, SequenceFault};
use slipstream_server::engine::request::Request;

/// Bytes of every vocabulary id.
pub type Pieces = [Vec<u8>];

/// What a request must produce, whatever speculates, batches or chunks.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// Tokens of this call that the client gets.
    pub tokens: Vec<TokenId>,
    /// Log-probability of each of them, `[tokens]`; empty unless asked for.
    pub logprobs: Vec<f64>,
    /// Text of this call: all output text behind what the prefix alone made certain.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
    /// All tokens chosen after the prefix: `tokens`, then those a stop string swallowed, then the
    /// end token if one was chosen.
    pub chosen: Vec<TokenId>,
}

/// One row at a time through a forward whose pool is this sequence's alone.
struct SingleRow<'a> {
    forward: &'a mut dyn Forward,
    blocks: Vec<BlockId>,
    batch: RaggedBatch,
    logits: Logits,
    owner: u64,
    scope: u64,
}

impl SingleRow<'_> {
    /// Computes `token` at `position` and returns its logits row, `[vocab]`.
    fn row(&mut self, token: TokenId, position: usize) -> &[f32] {
        self.batch.clear();
        self.batch.push(SegmentInput {
            tokens: &[token],
            start: position,
            block_table: &self.blocks,
            logits_from: 0,
            owner: self.owner,
            scope: self.scope,
        });
        self.forward.forward(&self.batch, &mut self.logits).expect("the oracle's forward works");
        self.logits.row(0)
    }
}

/// Decodes `request` the slow and obvious way. `owner` is the owner tag of the oracle's rows, for
/// models that inject faults by owner.
///
/// # Panics
/// When the forward's pool cannot hold the request, or the forward fails.
pub fn decode(
    forward: &mut dyn Forward,
    pieces: &Pieces,
    request: &Request,
    owner: u64,
) -> Expected {
    let num_blocks = request.max_len().div_ceil(BLOCK_LEN);
    assert!(num_blocks <= forward.limits().num_blocks, "the oracle's pool is too small");
    let blocks = (0..num_blocks).map(|block| BlockId(u32::try_from(block).unwrap())).collect();
    let (batch, logits) = (RaggedBatch::new(), Logits::new());
    let scope = request.scope().tag();
    let mut rows = SingleRow { forward, blocks, batch, logits, owner, scope };
    let mut history = request.prompt.clone();
    history.extend_from_slice(&request.output_prefix);
    let mut run = Run::new(pieces, request);
    if let Some(reason) = run.end_within_prefix() {
        return run.finish(reason);
    }
    for (position, &token) in history.iter().enumerate().take(history.len() - 1) {
        rows.row(token, position);
    }
    let mut chooser = Chooser::new();
    loop {
        let last = *history.last().expect("prompts are never empty");
        let logits = rows.row(last, history.len() - 1);
        let context = ChoiceContext {
            params: &request.params,
            history: &history,
            ahead: &[],
            prompt_len: request.prompt.len(),
            sharpening: 1.0,
        };
        let token = match chooser.choose(logits, &context) {
            Ok(token) => token,
            Err(fault) => return run.finish(FinishReason::Fault(SequenceFault::Choice(fault))),
        };
        let logprob = if request.logprobs { log_probability(logits, token) } else { f64::NAN };
        history.push(token);
        if let Some(reason) = run.push(token, logprob) {
            return run.finish(reason);
        }
    }
}

/// The rules that turn chosen tokens into a response.
struct Run<'a> {
    pieces: &'a Pieces,
    request: &'a Request,
    chosen: Vec<TokenId>,
    logprobs: Vec<f64>,
    /// Bytes of prefix and chosen tokens, without an end token.
    bytes: Vec<u8>,
    /// How many of `bytes` came from the prefix.
    prefix_len: usize,
    /// Where the text is cut, once a stop string was found.
    cut: Option<usize>,
}

impl<'a> Run<'a> {
    fn new(pieces: &'a Pieces, request: &'a Request) -> Self {
        let (chosen, logprobs, bytes) = (Vec::new(), Vec::new(), Vec::new());
        Self { pieces, request, chosen, logprobs, bytes, prefix_len: 0, cut: None }
    }

    /// The prefix may have said everything already.
    fn end_within_prefix(&mut self) -> Option<FinishReason> {
        let params = &self.request.params;
        for (index, token) in self.request.output_prefix.iter().enumerate() {
            if index >= params.min_tokens && params.end_ids.contains(token) {
                return Some(FinishReason::EndToken(*token));
            }
            let old_len = self.bytes.len();
            self.bytes.extend_from_slice(&self.pieces[token.index()]);
            self.prefix_len = self.bytes.len();
            if let Some(reason) = self.stop(old_len, index + 1) {
                return Some(reason);
            }
        }
        let is_full = self.request.output_prefix.len() >= self.request.max_tokens;
        is_full.then_some(FinishReason::Length)
    }

    fn push(&mut self, token: TokenId, logprob: f64) -> Option<FinishReason> {
        self.chosen.push(token);
        if self.request.params.end_ids.contains(&token) {
            return Some(FinishReason::EndToken(token));
        }
        self.logprobs.push(logprob);
        let old_len = self.bytes.len();
        self.bytes.extend_from_slice(&self.pieces[token.index()]);
        let output_len = self.request.output_prefix.len() + self.chosen.len();
        if let Some(reason) = self.stop(old_len, output_len) {
            return Some(reason);
        }
        (output_len >= self.request.max_tokens).then_some(FinishReason::Length)
    }

    /// Among all occurrences of stop strings that end in the bytes after `old_len`, the one that
    /// begins first, then the one of the lowest index.
    fn stop(&mut self, old_len: usize, output_len: usize) -> Option<FinishReason> {
        if output_len < self.request.params.min_tokens {
            return None;
        }
        for begin in 0..self.bytes.len() {
            for (index, stop) in self.request.stop_strings.iter().enumerate() {
                let end = begin + stop.len();
                if end > old_len && self.bytes[begin..].starts_with(stop) {
                    self.cut = Some(begin);
                    return Some(FinishReason::StopString(index));
                }
            }
        }
        None
    }

    fn finish(self, reason: FinishReason) -> Expected {
        let prefix = &self.bytes[..self.prefix_len];
        let cut = self.cut.unwrap_or(self.bytes.len());
        let mut tokens = Vec::new();
        let mut begin = prefix.len();
        for &token in &self.chosen[..self.logprobs.len()] {
            let end = begin + self.pieces[token.index()].len();
            // Dropped is what lies wholly behind the cut; a token without bytes on it stays.
            if begin >= cut && end > cut {
                break;
            }
            tokens.push(token);
            begin = end;
        }
        let mut logprobs = self.logprobs;
        logprobs.truncate(if self.request.logprobs { tokens.len() } else { 0 });
        let text = text_behind(prefix, &self.bytes[..cut]);
        Expected { tokens, logprobs, text, reason, chosen: self.chosen }
    }
}

/// The text of `bytes` that the client does not hold when it knows the complete characters of
/// `prefix`. Empty when a stop string cut the text inside the prefix.
#[must_use]
pub fn text_behind(prefix: &[u8], bytes: &[u8]) -> String {
    let known = known_text(prefix);
    let all = String::from_utf8_lossy(bytes);
    all.strip_prefix(known.as_str()).unwrap_or("").to_owned()
}

/// The text that is certain after `bytes`: everything but an incomplete last character.
#[must_use]
pub fn known_text(bytes: &[u8]) -> String {
    // An incomplete character is at most three bytes long, and one that more bytes could still
    // complete leaves an error without a length.
    let is_open = |tail: &[u8]| std::str::from_utf8(tail).is_err_and(|e| e.error_len().is_none());
    let mut end = bytes.len();
    for len in 1..=bytes.len().min(3) {
        let tail = &bytes[bytes.len() - len..];
        if is_open(tail) && std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0) {
            end = bytes.len() - len;
        }
    }
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The bytes of `tokens` one after another.
#[must_use]
pub fn bytes_of(pieces: &Pieces, tokens: &[TokenId]) -> Vec<u8> {
    tokens.iter().flat_map(|token| pieces[token.index()].iter().copied()).collect()
}
