//! Owns how the samples of one prompt are written to stdout: a single one as it comes, several one
//! behind the other under a heading each, the first as it comes. Knows no server.

use std::io::{self, Write};

use slipstream_proto::v1;

use super::client::Completion;
use super::terminal::{Attribution, Palette};

/// Writes the samples of one call.
pub(super) struct SampleWriter {
    palette: Palette,
    first_index: u32,
    samples: Vec<Waiting>,
}

/// What is known of one sample's looks.
#[derive(Default)]
struct Waiting {
    attribution: Attribution,
    /// Text as it will be written. That of the first sample never waits.
    text: String,
}

impl SampleWriter {
    /// For a request that is about to be sent.
    pub(super) fn new(message: &v1::GenerateRequest, palette: Palette) -> Self {
        let num = Completion::of(message).samples().count();
        let samples = std::iter::repeat_with(Waiting::default).take(num).collect();
        Self { palette, first_index: message.sample_index, samples }
    }

    /// Takes some output; that of the first sample is written at once.
    pub(super) fn take(&mut self, event: &v1::Tokens) -> io::Result<()> {
        let is_one = self.samples.len() == 1;
        let Some(sample) = self.samples.get_mut(event.sample as usize) else { return Ok(()) };
        let is_begun = !sample.text.is_empty();
        let text = styled(event, &mut sample.attribution, self.palette);
        if event.sample > 0 {
            sample.text.push_str(&text);
            return Ok(());
        }
        let mut out = io::stdout().lock();
        if !is_one && !is_begun {
            // Remembered, so that the heading comes once.
            sample.text.push_str(&heading(self.first_index));
            writeln!(out, "{}", self.palette.bold(&sample.text))?;
        }
        write!(out, "{text}")?;
        out.flush()
    }

    /// Ends the line of a single sample; writes all but the first of several.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let is_one = self.samples.len() == 1;
        for (sample, offset) in self.samples.iter().zip(0..) {
            if !is_one && (offset > 0 || sample.text.is_empty()) {
                let heading = heading(self.first_index.saturating_add(offset));
                writeln!(out, "{}", self.palette.bold(&heading))?;
            }
            if offset > 0 {
                write!(out, "{}", sample.text)?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

/// What stands above a sample: the number that asks for it alone.
fn heading(sample_index: u32) -> String {
    format!("--- sample {sample_index} ---")
}

/// An event's text, coloured where tokens carry their bytes.
pub(super) fn styled(
    event: &v1::Tokens,
    attribution: &mut Attribution,
    palette: Palette,
) -> String {
    if !palette.colour {
        return event.text.clone();
    }
    let runs = attribution.runs(event).into_iter();
    runs.map(|(provenance, text)| palette.provenance(provenance, &text)).collect()
}
