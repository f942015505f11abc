//! Owns how output looks: tokens coloured by provenance, numbers in columns. Knows no server.

use std::collections::VecDeque;
use std::io::{self, Write};

use slipstream_proto::v1::{Provenance, Tokens};

const RESET: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";

/// Writes text in colour, or plainly where nobody would see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Palette {
    /// Whether to write escape sequences.
    pub(super) colour: bool,
}

impl Palette {
    /// A headline.
    pub(super) fn bold(self, text: &str) -> String {
        self.styled(BOLD, text)
    }

    /// Something that matters less.
    pub(super) fn dim(self, text: &str) -> String {
        self.styled(DIM, text)
    }

    /// Text of tokens of this provenance.
    pub(super) fn provenance(self, provenance: Provenance, text: &str) -> String {
        match colour(provenance) {
            Some(colour) => self.styled(colour, text),
            None => text.to_owned(),
        }
    }

    fn styled(self, style: &str, text: &str) -> String {
        if self.colour { format!("{style}{text}{RESET}") } else { text.to_owned() }
    }

    /// What the colours mean; nothing where there are none.
    pub(super) fn legend(self) -> Option<String> {
        if !self.colour {
            return None;
        }
        let named = [
            (Provenance::Accepted, "accepted proposal"),
            (Provenance::Correction, "correction"),
            (Provenance::Bonus, "bonus after a fully accepted proposal"),
            (Provenance::Plain, "plain step"),
        ];
        let painted = named.map(|(provenance, name)| self.provenance(provenance, name));
        Some(format!("colours: {}", painted.join(", ")))
    }
}

fn colour(provenance: Provenance) -> Option<&'static str> {
    match provenance {
        Provenance::Accepted => Some("\x1b[32m"),
        Provenance::Correction => Some("\x1b[33m"),
        Provenance::Bonus => Some("\x1b[36m"),
        Provenance::Plain | Provenance::Unspecified => None,
    }
}

/// Tells which token each character of a stream came from: text may lag behind its tokens.
#[derive(Debug, Default)]
pub(super) struct Attribution {
    /// Tokens whose text has not come yet, with the bytes still to come.
    pending: VecDeque<(usize, Provenance)>,
}

impl Attribution {
    /// Cuts an event's text where the provenance changes. Needs events with token bytes.
    pub(super) fn runs(&mut self, event: &Tokens) -> Vec<(Provenance, String)> {
        for token in &event.tokens {
            let bytes_len = token.bytes.as_ref().map_or(0, Vec::len);
            self.pending.push_back((bytes_len, token.provenance()));
        }
        let mut runs: Vec<(Provenance, String)> = Vec::new();
        for character in event.text.chars() {
            let provenance = self.take(character.len_utf8());
            match runs.last_mut() {
                Some((last, text)) if *last == provenance => text.push(character),
                Some(_) | None => runs.push((provenance, character.to_string())),
            }
        }
        runs
    }

    /// Provenance of the next `len` bytes: that of the first of them.
    fn take(&mut self, mut len: usize) -> Provenance {
        while self.pending.front().is_some_and(|(left, _)| *left == 0) {
            self.pending.pop_front();
        }
        let first = self.pending.front().map_or(Provenance::Unspecified, |(_, first)| *first);
        while let Some((left, _)) = self.pending.front_mut() {
            let taken = len.min(*left);
            *left -= taken;
            len -= taken;
            if len == 0 {
                break;
            }
            self.pending.pop_front();
        }
        first
    }
}

/// Writes rows in right-aligned columns, the first column left-aligned.
pub(super) fn write_table(out: &mut impl Write, rows: &[Vec<String>]) -> io::Result<()> {
    write_columns(out, rows, 1)
}

/// Writes rows in left-aligned columns.
pub(super) fn write_left_table(out: &mut impl Write, rows: &[Vec<String>]) -> io::Result<()> {
    write_columns(out, rows, usize::MAX)
}

/// Columns from `num_left` on are right-aligned.
fn write_columns(out: &mut impl Write, rows: &[Vec<String>], num_left: usize) -> io::Result<()> {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..num_columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            match column < num_left {
                true => line.push_str(&format!("{cell:<width$}")),
                false => line.push_str(&format!("{cell:>width$}")),
            }
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Attribution, write_table};
    use slipstream_proto::v1::{Provenance, Token, Tokens};

    fn event(text: &str, tokens: &[(&[u8], Provenance)]) -> Tokens {
        let token = |(bytes, provenance): &(&[u8], Provenance)| Token {
            bytes: Some(bytes.to_vec()),
            provenance: (*provenance).into(),
            ..Token::default()
        };
        let tokens = tokens.iter().map(token).collect();
        Tokens { text: text.to_owned(), tokens, sample: 0 }
    }

    #[test]
    fn late_text_belongs_to_its_token() {
        let mut attribution = Attribution::default();
        let (plain, accepted) = (Provenance::Plain, Provenance::Accepted);
        assert_eq!(attribution.runs(&event("", &[(b"a\xc3", plain)])), []);
        let runs = attribution.runs(&event("aéb", &[(b"\xa9", accepted), (b"b", accepted)]));
        assert_eq!(runs, [(plain, "aé".to_owned()), (accepted, "b".to_owned())]);
        let runs = attribution.runs(&event("x", &[]));
        assert_eq!(runs, [(Provenance::Unspecified, "x".to_owned())]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["bcd".to_owned(), "10".to_owned()]];
        let mut out = Vec::new();
        write_table(&mut out, &rows).expect("memory takes everything");
        assert_eq!(String::from_utf8_lossy(&out), "a     1\nbcd  10\n");
    }
}
