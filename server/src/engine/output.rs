//! Owns the output of one sequence on its way to the client: bytes, stop strings, what may be
//! released, what has been taken. Everything here depends on the tokens alone, never on which step
//! brought them, so batching and speculation cannot shift a cut or split a character.

use super::event::{Event, Finished, OutputToken, TokensEvent};
use super::stop::{self, StopMatch};

/// When a stop string counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct StopRules<'a> {
    /// The strings, none empty.
    pub(super) strings: &'a [Vec<u8>],
    /// A match that is complete with fewer output tokens than this is ignored.
    pub(super) min_tokens: usize,
}

/// What a sequence has produced and what of it was taken.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// Bytes of the whole output, the client's prefix included.
    bytes: Vec<u8>,
    /// How many of `bytes` the prefix contributed.
    prefix_bytes_len: usize,
    /// Output tokens of the prefix.
    prefix_len: usize,
    /// Tokens of this call.
    tokens: Vec<OutputToken>,
    /// Where each token's bytes end in `bytes`, `[tokens]`.
    ends: Vec<usize>,
    /// Tokens that may be sent: no stop string can begin before their end any more.
    released_len: usize,
    /// Tokens already taken.
    taken_len: usize,
    /// Bytes already taken as text.
    taken_bytes: usize,
    /// Whether an incomplete character at the end of the bytes can still be completed by a call
    /// that goes on from here.
    can_go_on: bool,
    finished: Option<Finished>,
}

/// Bytes of a token that room is made for: more than tokens of text have on average.
const RESERVED_BYTES: usize = 8;

impl Output {
    /// Makes room for this many more tokens.
    pub(super) fn reserve(&mut self, num_tokens: usize) {
        self.tokens.reserve(num_tokens);
        self.ends.reserve(num_tokens);
        self.bytes.reserve(num_tokens * RESERVED_BYTES);
    }

    /// Adds one token of the prefix that the client holds already: its bytes count for stop strings
    /// and its complete characters are not sent again.
    pub(super) fn push_prefix(&mut self, piece: &[u8], rules: StopRules<'_>) -> Option<StopMatch> {
        let new_from = self.bytes.len();
        self.bytes.extend_from_slice(piece);
        self.prefix_bytes_len = self.bytes.len();
        self.prefix_len += 1;
        let mut known = String::new();
        self.taken_bytes += decode(&self.bytes[self.taken_bytes..], false, &mut known);
        let found = self.find(new_from, rules);
        if let Some(found) = found {
            self.cut(found.cut);
        }
        found
    }

    /// Adds one token. On a match the output is cut before the stop string.
    pub(super) fn push(
        &mut self,
        token: OutputToken,
        piece: &[u8],
        rules: StopRules<'_>,
    ) -> Option<StopMatch> {
        let new_from = self.bytes.len();
        self.bytes.extend_from_slice(piece);
        self.tokens.push(token);
        self.ends.push(self.bytes.len());
        let found = self.find(new_from, rules);
        if let Some(found) = found {
            self.cut(found.cut);
        } else {
            let safe = self.bytes.len() - stop::held_len(&self.bytes, rules.strings);
            while self.ends.get(self.released_len).is_some_and(|&end| end <= safe) {
                self.released_len += 1;
            }
        }
        found
    }

    fn find(&self, new_from: usize, rules: StopRules<'_>) -> Option<StopMatch> {
        if self.prefix_len + self.tokens.len() < rules.min_tokens {
            return None;
        }
        stop::find(&self.bytes, new_from, rules.strings)
    }

    /// Ends the bytes at `cut` and drops the tokens that lie behind it: kept are those that end at
    /// or before it, or that begin before it. Never reaches into what the client holds already.
    fn cut(&mut self, cut: usize) {
        let start_of = |index: usize| match index.checked_sub(1) {
            Some(previous) => self.ends[previous],
            None => self.prefix_bytes_len,
        };
        let kept = (0..self.tokens.len())
            .take_while(|&index| self.ends[index] <= cut || start_of(index) < cut)
            .count();
        self.tokens.truncate(kept);
        self.ends.truncate(kept);
        self.bytes.truncate(cut.max(self.taken_bytes));
    }

    /// Drops what is held back, for an end from outside: a call that goes on from the released
    /// tokens decides what becomes of it, exactly as this one would have.
    pub(super) fn withhold(&mut self) {
        self.tokens.truncate(self.released_len);
        self.ends.truncate(self.released_len);
        self.bytes.truncate(self.ends.last().copied().unwrap_or(self.prefix_bytes_len));
        self.can_go_on = true;
    }

    /// Closes the output: everything held back may go, and the end follows it.
    pub(super) fn finish(&mut self, finished: Finished) {
        self.released_len = self.tokens.len();
        self.finished = Some(finished);
    }

    /// Output tokens of this call that the client gets.
    pub(super) fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that may be sent and were not taken yet.
    pub(super) fn unread_len(&self) -> usize {
        self.released_len - self.taken_len
    }

    /// Whether [`take_event`](Self::take_event) would return something.
    pub(super) fn has_news(&self) -> bool {
        self.taken_len < self.released_len || self.finished.is_some()
    }

    /// Everything released and not taken yet, in one event; then the end, once.
    pub(super) fn take_event(&mut self) -> Option<Event> {
        let mut event = TokensEvent::default();
        event.tokens.extend_from_slice(&self.tokens[self.taken_len..self.released_len]);
        self.taken_len = self.released_len;
        let is_finished = self.finished.is_some();
        let text_end = match self.released_len.checked_sub(1) {
            _ if is_finished => self.bytes.len(),
            Some(last) => self.ends[last],
            None => self.taken_bytes,
        };
        let ready = &self.bytes[self.taken_bytes..text_end.max(self.taken_bytes)];
        let is_final = is_finished && !self.can_go_on;
        self.taken_bytes += decode(ready, is_final, &mut event.text);
        if event.tokens.is_empty() && event.text.is_empty() {
            return self.finished.take().map(Event::Finished);
        }
        Some(Event::Tokens(event))
    }
}

/// Appends the characters of `bytes` to `text`; invalid bytes become U+FFFD, each maximal invalid
/// run once. An incomplete character at the end is left unless this `is_final`. Returns the bytes
/// consumed. Splitting the input elsewhere gives the same text.
fn decode(bytes: &[u8], is_final: bool, text: &mut String) -> usize {
    let mut consumed = 0;
    while consumed < bytes.len() {
        match std::str::from_utf8(&bytes[consumed..]) {
            Ok(valid) => {
                text.push_str(valid);
                return bytes.len();
            }
            Err(error) => {
                let valid_end = consumed + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[consumed..valid_end]));
                consumed = valid_end;
                match error.error_len() {
                    Some(invalid_len) => consumed += invalid_len,
                    None if is_final => consumed = bytes.len(),
                    None => return consumed,
                }
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }
    consumed
}

#[cfg(test)]
mod tests {
    use super::decode;

    #[test]
    fn splitting_never_changes_the_text() {
        let bytes = b"a\xE2\x82\xACb\xF0\x9F\xA6\x80\xFF\xC3(\xE2\x82";
        let whole = String::from_utf8_lossy(bytes).into_owned();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let mut text = String::new();
                let mut taken = 0;
                for (end, is_final) in [(first, false), (second, false), (bytes.len(), true)] {
                    taken += decode(&bytes[taken..end], is_final, &mut text);
                }
                assert_eq!(text, whole, "split at {first} and {second}");
            }
        }
    }
}
