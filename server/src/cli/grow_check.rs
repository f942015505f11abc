//! Owns the comparison of a grown model with its source: both read the same text, every token in
//! its place, and their next tokens and log-probabilities are compared. Knows no server.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail, ensure};
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::log_probability;
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, WeightFormat, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::tokenizer::Tokenizer;
use slipstream_model::transformer::{Transformer, TransformerOptions};

use super::grow::Interrupted;

/// Tokens that are read in one piece; a text begins anew behind them.
const WINDOW_LEN: usize = 512;
/// Rows of one forward pass.
const PASS_ROWS: usize = 64;
/// Share of next tokens that must be the same.
const AGREEMENT_MIN: f64 = 0.999;
/// Largest difference in bits per byte, relative.
const BITS_DIFFERENCE_MAX: f64 = 0.001;
/// Read unless other texts are given: sources of this program.
const TEXTS: [&str; 6] = [
    include_str!("mod.rs"),
    include_str!("../engine/mod.rs"),
    include_str!("../grpc/status.rs"),
    include_str!("../grpc/validate.rs"),
    include_str!("../handle.rs"),
    include_str!("../startup.rs"),
];

/// Flags about the comparison.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Comparison")]
pub(super) struct CheckFlags {
    /// Text to read; may be given several times [default: sources of this program]
    #[arg(long, value_name = "FILE", requires = "check")]
    text: Vec<PathBuf>,
    /// Tokens to compare
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 10_000,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    tokens: u32,
    /// Threads for the networks
    #[arg(long, value_name = "N", env = "SLIPSTREAM_THREADS")]
    threads: Option<usize>,
}

/// What both models made of the text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Findings {
    num_tokens: usize,
    /// Positions at which both give the same next token.
    num_same: usize,
    /// Positions at which all logits have the same bits.
    num_identical: usize,
    /// Bits that each needs for the text.
    bits: [f64; 2],
    num_bytes: usize,
}

/// Compares, and fails where the two differ by more than they may.
pub(super) fn run(
    source: LoadedModel,
    grown: &Path,
    flags: &CheckFlags,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    let options = LoadOptions { format: Some(WeightFormat::Q8_0), ..LoadOptions::default() };
    let grown = load(ModelSource::Path(grown.to_owned()), &options, &mut |_| {})
        .with_context(|| format!("cannot load {}", grown.display()))?;
    if grown.tokenizer.fingerprint() != source.tokenizer.fingerprint() {
        bail!("{:?} has another vocabulary than {:?}", grown.name, source.name);
    }
    let windows = windows(&source.tokenizer, flags)?;
    let lens = windows.iter().map(|window| window.len().div_ceil(BLOCK_LEN));
    let num_blocks = lens.max().unwrap_or(1);
    let token_bytes = source.tokenizer.token_bytes();
    let names = [source.name.clone(), grown.name.clone()];
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = flags.threads.unwrap_or(cores);
    let mut networks =
        [network(source, num_blocks, threads)?, network(grown, num_blocks, threads)?];
    let mut findings = Findings::default();
    for window in &windows {
        if stop.load(Ordering::Relaxed) {
            return Err(Interrupted.into());
        }
        compare(&mut networks, window, &mut findings)?;
        let predicted = &window[1..];
        findings.num_bytes += predicted.iter().map(|id| token_bytes.get(*id).len()).sum::<usize>();
    }
    findings.conclude(&names)
}

/// The text in windows with as many predicted tokens as asked for.
fn windows(tokenizer: &Tokenizer, flags: &CheckFlags) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let texts = match flags.text.is_empty() {
        true => TEXTS.map(str::to_owned).to_vec(),
        false => {
            let read = |path: &PathBuf| {
                fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
            };
            flags.text.iter().map(read).collect::<anyhow::Result<_>>()?
        }
    };
    let mut left = flags.tokens as usize;
    let mut windows = Vec::new();
    for text in &texts {
        let ids = tokenizer.encode(text, false)?;
        for window in ids.chunks(WINDOW_LEN).filter(|window| window.len() > 1) {
            let len = window.len().min(left + 1);
            if left > 0 {
                windows.push(window[..len].to_vec());
                left -= len - 1;
            }
        }
    }
    let wanted = flags.tokens as usize;
    let found = wanted - left;
    ensure!(
        left == 0,
        "the text has {found} tokens, and {wanted} are wanted: give more with --text"
    );
    Ok(windows)
}

fn network(model: LoadedModel, num_blocks: usize, threads: usize) -> anyhow::Result<Transformer> {
    let packed = Arc::new(PackedLlama::pack(model.config, model.weights)?);
    let options =
        TransformerOptions { num_blocks, threads, isa: Isa::detect(), kv_type: KvType::F32 };
    Ok(Transformer::new(packed, options)?)
}

/// Reads one window with both.
fn compare(
    networks: &mut [Transformer; 2],
    window: &[TokenId],
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let num_blocks = window.len().div_ceil(BLOCK_LEN);
    let table: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
    let mut batch = RaggedBatch::new();
    let mut logits = [Logits::new(), Logits::new()];
    // The last token is predicted, not read.
    let read = &window[..window.len() - 1];
    for (pass, tokens) in read.chunks(PASS_ROWS).enumerate() {
        let start = pass * PASS_ROWS;
        batch.clear();
        let block_table = &table;
        batch.push(SegmentInput { tokens, start, block_table, logits_from: 0, owner: 1, scope: 0 });
        for (network, logits) in networks.iter_mut().zip(&mut logits) {
            network.forward(&batch, logits)?;
        }
        for row in 0..tokens.len() {
            let rows = [logits[0].row(row), logits[1].row(row)];
            findings.add(rows, window[start + row + 1]);
        }
    }
    Ok(())
}

/// The likeliest token, the first of equals.
fn likeliest(logits: &[f32]) -> usize {
    let best = |best: usize, index: usize| if logits[index] > logits[best] { index } else { best };
    (0..logits.len()).fold(0, best)
}

impl Findings {
    fn add(&mut self, rows: [&[f32]; 2], next: TokenId) {
        self.num_tokens += 1;
        self.num_same += usize::from(likeliest(rows[0]) == likeliest(rows[1]));
        let mut pairs = rows[0].iter().zip(rows[1]);
        self.num_identical += usize::from(pairs.all(|(a, b)| a.to_bits() == b.to_bits()));
        for (bits, row) in self.bits.iter_mut().zip(rows) {
            *bits -= log_probability(row, next) * std::f64::consts::LOG2_E;
        }
    }

    fn conclude(&self, names: &[String; 2]) -> anyhow::Result<()> {
        let agreement = self.num_same as f64 / self.num_tokens as f64;
        let identical = self.num_identical as f64 / self.num_tokens as f64;
        let bits = self.bits.map(|bits| bits / self.num_bytes as f64);
        let difference = bits[1] / bits[0] - 1.0;
        let mut out = io::stdout().lock();
        writeln!(out, "{} tokens, {} bytes", self.num_tokens, self.num_bytes)?;
        writeln!(out, "same next token:      {:.3} %", 100.0 * agreement)?;
        writeln!(out, "same bits of logits:  {:.3} %", 100.0 * identical)?;
        for (name, bits) in names.iter().zip(bits) {
            writeln!(out, "bits per byte:        {bits:.5}  {name}")?;
        }
        writeln!(out, "difference:           {:+.4} %", 100.0 * difference)?;
        ensure!(
            agreement >= AGREEMENT_MIN,
            "the two give the same next token for {:.3} % only; {} % are required",
            100.0 * agreement,
            100.0 * AGREEMENT_MIN
        );
        // Written so that a difference that is no number fails, too.
        ensure!(
            difference.abs() <= BITS_DIFFERENCE_MAX,
            "their bits per byte differ by {:.3} %; {} % are allowed",
            100.0 * difference,
            100.0 * BITS_DIFFERENCE_MAX
        );
        writeln!(out, "PASS: the grown model says what its source says.")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Findings;
    use slipstream_model::ids::TokenId;

    #[test]
    fn models_that_differ_are_told() {
        let names = ["a".to_owned(), "b".to_owned()];
        let mut same = Findings { num_bytes: 4, ..Findings::default() };
        same.add([&[0.0, 1.0], &[0.0, 1.0]], TokenId(1));
        assert_eq!((same.num_same, same.num_identical), (1, 1));
        assert!(same.conclude(&names).is_ok());
        let mut other = same;
        other.add([&[0.0, 1.0], &[1.0, 0.0]], TokenId(1));
        assert!(other.conclude(&names).unwrap_err().to_string().contains("same next token"));
        let mut worse = same;
        worse.add([&[0.0, 1.0], &[0.0, 1.1]], TokenId(0));
        assert!(worse.conclude(&names).unwrap_err().to_string().contains("bits per byte"));
        let silent = Findings { num_tokens: 1, num_same: 1, ..Findings::default() };
        assert!(silent.conclude(&names).is_err());
    }
}
