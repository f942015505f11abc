//! Owns the table from token id to the exact bytes it stands for, made once at load, and the rules
//! that tell bytes from how a tokenizer spells its tokens. Knows no tokenizer and no streams:
//! joining bytes to characters is up to whoever reads the table.

use crate::ids::TokenId;

/// How a tokenizer's vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Each byte is one printable character, in the manner of GPT-2.
    ByteLevel,
    /// Text with U+2581 for spaces; where `byte_tokens`, `<0x41>` is the byte 0x41. The manner of
    /// SentencePiece.
    SentencePiece {
        /// Whether byte tokens exist.
        byte_tokens: bool,
    },
}

impl Spelling {
    /// The bytes of an ordinary token of the vocabulary.
    pub(crate) fn bytes_of(self, token: &str) -> Vec<u8> {
        match self {
            // A token with a character outside the alphabet can only stand for itself.
            Self::ByteLevel => token
                .chars()
                .map(byte_of)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::SentencePiece { byte_tokens } => match byte_token(token) {
                Some(byte) if byte_tokens => vec![byte],
                _ => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// Characters of the byte alphabet: 188 printable ones stand for themselves, the other 68 bytes are
/// spelled by the characters from U+0100 on, in byte order.
const ALPHABET_LEN: usize = 256 + 68;

/// The byte that each character of the alphabet spells, by code point.
static ALPHABET: [Option<u8>; ALPHABET_LEN] = alphabet();

const fn alphabet() -> [Option<u8>; ALPHABET_LEN] {
    let mut table = [None; ALPHABET_LEN];
    let mut next_spelling = 256;
    let mut byte = 0;
    while byte < 256 {
        let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        if printable {
            table[byte] = Some(byte as u8);
        } else {
            table[next_spelling] = Some(byte as u8);
            next_spelling += 1;
        }
        byte += 1;
    }
    table
}

fn byte_of(spelling: char) -> Option<u8> {
    ALPHABET.get(spelling as usize).copied().flatten()
}

/// The byte that `<0xXX>` names.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if is_plain { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Token id -> bytes. Special tokens have none, and neither have ids past the tokenizer's own
/// (models may pad their vocabulary).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end, `[len]`; they start where the previous token's end.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// A table of the given tokens' bytes, in id order.
    pub fn new<B: AsRef<[u8]>>(tokens: impl IntoIterator<Item = B>) -> Self {
        let mut table = Self::default();
        for token in tokens {
            table.bytes.extend_from_slice(token.as_ref());
            table.ends.push(table.bytes.len());
        }
        table
    }

    /// The bytes of one token. Not necessarily whole characters.
    #[must_use]
    pub fn get(&self, id: TokenId) -> &[u8] {
        let Some(end) = self.ends.get(id.index()) else { return &[] };
        let start = id.index().checked_sub(1).map_or(0, |previous| self.ends[previous]);
        &self.bytes[start..*end]
    }

    /// Number of ids with an entry: the tokenizer's vocabulary.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether the table has no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of a sequence of tokens, joined.
    #[must_use]
    pub fn join(&self, ids: &[TokenId]) -> Vec<u8> {
        ids.iter().flat_map(|id| self.get(*id)).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{ALPHABET, Spelling, TokenBytes};
    use crate::ids::TokenId;

    #[test]
    fn the_alphabet_spells_every_byte_once() {
        let mut spelled: Vec<u8> = ALPHABET.iter().flatten().copied().collect();
        spelled.sort_unstable();
        assert_eq!(spelled, (0..=255).collect::<Vec<u8>>());
        assert_eq!(Spelling::ByteLevel.bytes_of("Ġfn"), b" fn");
        assert_eq!(Spelling::ByteLevel.bytes_of("Ċ"), b"\n");
        assert_eq!(Spelling::ByteLevel.bytes_of("Ã©"), "é".as_bytes());
        assert_eq!(Spelling::ByteLevel.bytes_of("a b"), b"a b");
    }

    #[test]
    fn sentence_piece_tokens_become_bytes() {
        let spelling = Spelling::SentencePiece { byte_tokens: true };
        assert_eq!(spelling.bytes_of("\u{2581}fn"), b" fn");
        assert_eq!(spelling.bytes_of("<0x0A>"), b"\n");
        assert_eq!(spelling.bytes_of("<0xFF>"), [0xFF]);
        assert_eq!(spelling.bytes_of("<0x+A>"), b"<0x+A>");
        let plain = Spelling::SentencePiece { byte_tokens: false };
        assert_eq!(plain.bytes_of("<0x0A>"), b"<0x0A>");
    }

    #[test]
    fn ids_past_the_end_have_no_bytes() {
        let table = TokenBytes::new(["", "ab", "c"]);
        assert_eq!(table.get(TokenId(0)), b"");
        assert_eq!(table.get(TokenId(1)), b"ab");
        assert_eq!(table.get(TokenId(3)), b"");
        assert_eq!(table.join(&[TokenId(2), TokenId(1), TokenId(9)]), b"cab");
        assert_eq!(table.len(), 3);
    }
}
