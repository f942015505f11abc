//! Owns the comparison of two completions that must be equal.

use std::fmt;

use super::client::Completion;

/// Where two completions first differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// Index of the first token that differs.
    position: usize,
    /// What each has there; `None` past its end.
    tokens: [Option<(u32, String)>; 2],
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |token: &Option<(u32, String)>| match token {
            Some((id, text)) => format!("token {id} {text:?}"),
            None => "the end".to_owned(),
        };
        let [plain, other] = &self.tokens;
        write!(
            f,
            "output token {}: plain decoding gives {}, this gives {}",
            self.position,
            shown(plain),
            shown(other)
        )
    }
}

/// The first difference in tokens, text or end. Completions need token bytes for a readable answer.
pub(super) fn first_difference(plain: &Completion, other: &Completion) -> Option<Difference> {
    let len = plain.tokens.len().max(other.tokens.len());
    let at = |completion: &Completion, position: usize| {
        completion.tokens.get(position).map(|token| {
            let bytes = token.bytes.as_deref().unwrap_or_default();
            (token.id, String::from_utf8_lossy(bytes).into_owned())
        })
    };
    let differs = |position: &usize| at(plain, *position) != at(other, *position);
    let same_end = plain.finished.reason == other.finished.reason
        && plain.finished.cause == other.finished.cause
        && plain.text == other.text;
    let position = (0..len).find(differs).or((!same_end).then_some(len))?;
    Some(Difference { position, tokens: [at(plain, position), at(other, position)] })
}
