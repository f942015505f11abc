//! Owns the test vocabulary: strings short and repetitive enough that stop strings overlap them in
//! every way, and characters of two to four bytes cut at every place. Knows no model.

use slipstream_model::ids::TokenId;

use crate::random::Rng;

/// The token that usually ends a completion. It has no bytes.
pub const END: TokenId = TokenId(0);

/// The pieces that every test vocabulary begins with.
const PIECES: [&[u8]; 24] = [
    b"",
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"c",
    b"\n",
    b" ",
    b"\xC3",                // first half of e acute
    b"\xA9",                // second half
    b"\xE2\x82",            // two thirds of the euro sign
    b"\xAC",                // last third
    b"\xF0",                // a crab, byte by byte
    b"\x9F\xA6",            //
    b"\x80",                //
    b"\xFF",                // never valid
    b"aab",                 //
    b"abcab",               //
    "\u{20AC}b".as_bytes(), // a whole character and a letter
    b"a\xC3",               // a letter and half a character
    b"\xA9a",               // the other half and a letter
    b"cc",                  //
    b"\n\n",                //
    b"",                    // bytes of no token: some vocabularies have such ids
];

/// The pieces of a vocabulary of `vocab_size` ids: the nasty ones first, then plain words.
#[must_use]
pub fn pieces(vocab_size: usize) -> Vec<Vec<u8>> {
    let word = |id: usize| PIECES.get(id).map_or_else(|| format!("w{id} ").into(), |p| p.to_vec());
    (0..vocab_size).map(word).collect()
}

/// A stop string that has a fair chance to occur: some bytes out of one or more pieces in a row.
pub fn stop_string(rng: &mut Rng, pieces: &[Vec<u8>]) -> Vec<u8> {
    loop {
        let num_pieces = rng.between(1, 3);
        let bytes: Vec<u8> = (0..num_pieces).flat_map(|_| rng.pick(pieces).clone()).collect();
        if bytes.is_empty() {
            continue;
        }
        let begin = rng.below(bytes.len());
        let end = rng.between(begin + 1, bytes.len());
        return bytes[begin..end].to_vec();
    }
}
