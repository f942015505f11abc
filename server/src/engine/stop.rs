//! Owns the search for stop strings in output bytes. Knows bytes only: no tokens, no text.

/// A completed stop string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StopMatch {
    /// Which of the request's stop strings.
    pub(super) index: usize,
    /// Byte offset where it begins: the text ends here.
    pub(super) cut: usize,
}

/// Among the stop strings that end in the bytes from `new_from` on, the one that begins first;
/// the lowest index among equals.
pub(super) fn find(bytes: &[u8], new_from: usize, stops: &[Vec<u8>]) -> Option<StopMatch> {
    let mut best: Option<StopMatch> = None;
    for (index, stop) in stops.iter().enumerate() {
        // A match must end after `new_from`, so it begins after this.
        let from = (new_from + 1).saturating_sub(stop.len());
        let Some(window) = bytes.get(from..) else { continue };
        let Some(offset) = window.windows(stop.len()).position(|part| part == stop) else {
            continue;
        };
        let cut = from + offset;
        if best.is_none_or(|found| cut < found.cut) {
            best = Some(StopMatch { index, cut });
        }
    }
    best
}

/// Length of the longest end of `bytes` that is a proper beginning of a stop string: it may still
/// become one, so it is held back.
pub(super) fn held_len(bytes: &[u8], stops: &[Vec<u8>]) -> usize {
    let longest_start = |stop: &Vec<u8>| {
        let most = (stop.len() - 1).min(bytes.len());
        (1..=most).rev().find(|&len| bytes[bytes.len() - len..] == stop[..len]).unwrap_or(0)
    };
    stops.iter().map(longest_start).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{StopMatch, find, held_len};

    fn stops(list: &[&str]) -> Vec<Vec<u8>> {
        list.iter().map(|stop| stop.as_bytes().to_vec()).collect()
    }

    #[test]
    fn the_first_beginning_wins_then_the_lowest_index() {
        let found = find(b"xxabc", 2, &stops(&["bc", "abc", "ab"]));
        assert_eq!(found, Some(StopMatch { index: 1, cut: 2 }));
        assert_eq!(find(b"xxab", 4, &stops(&["ab"])), None);
        assert_eq!(find(b"xxab", 3, &stops(&["ab"])), Some(StopMatch { index: 0, cut: 2 }));
        assert_eq!(find(b"a", 0, &stops(&["abc"])), None);
    }

    #[test]
    fn a_possible_beginning_is_held() {
        assert_eq!(held_len(b"foo\n", &stops(&["\n\n", "\nfn"])), 1);
        assert_eq!(held_len(b"foo\n\n", &stops(&["\n\nfn"])), 2);
        assert_eq!(held_len(b"foo", &stops(&["bar"])), 0);
        assert_eq!(held_len(b"", &stops(&["bar"])), 0);
    }
}
