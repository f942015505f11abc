//! Owns what a load consists of: prompts cut out of real text, lengths that vary, and the moments
//! at which requests come. Everything follows from a seed. Knows no server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp, LogNormal};
use slipstream_model::ids::TokenId;
use slipstream_model::load::{LoadOptions, ModelSource, load};
use slipstream_model::math::ln;

/// Folders of this repository whose sources are the text.
const FOLDERS: [&str; 5] = ["model/src", "server/src", "draft/src", "verifier/src", "tests"];
/// Spread of lengths: the natural logarithm of a length has this standard deviation. At 0.7, one
/// length in ten is more than 2.4 times the median.
const LENGTH_SIGMA: f64 = 0.7;

/// Text as tokens.
#[derive(Clone, Debug)]
pub struct Corpus {
    tokens: Vec<TokenId>,
}

/// What one request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// Output tokens.
    pub num_tokens: usize,
}

/// How long prompts and outputs are: medians, and bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Median tokens of a prompt.
    pub prompt: usize,
    /// Median tokens of an output.
    pub output: usize,
    /// Most tokens of either.
    pub most: usize,
}

impl Corpus {
    /// The sources of this repository in the vocabulary of the model at `path`.
    ///
    /// # Errors
    /// When the model or the sources cannot be read.
    pub fn of_sources(path: &Path) -> anyhow::Result<Self> {
        let source = ModelSource::Path(path.to_owned());
        let model = load(source, &LoadOptions::default(), &mut |_| {})
            .with_context(|| format!("loading {}", path.display()))?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut files = Vec::new();
        for folder in FOLDERS {
            collect(&root.join(folder), &mut files)?;
        }
        files.sort();
        let mut tokens = Vec::new();
        for file in files {
            let text = std::fs::read_to_string(&file)?;
            tokens.extend(model.tokenizer.encode(&text, false).context("tokenising")?);
        }
        Ok(Self { tokens })
    }

    /// A piece of the text of this length from anywhere: two of them hardly ever begin alike.
    ///
    /// # Errors
    /// When there is less text.
    pub fn piece(&self, len: usize, random: &mut StdRng) -> anyhow::Result<Vec<TokenId>> {
        ensure!(len < self.tokens.len(), "the sources have {} tokens", self.tokens.len());
        let begin = random.random_range(0..self.tokens.len() - len);
        Ok(self.tokens[begin..begin + len].to_vec())
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Requests one after another, the same for the same seed.
#[derive(Debug)]
pub struct Arrivals<'a> {
    corpus: &'a Corpus,
    lengths: Lengths,
    random: StdRng,
}

impl<'a> Arrivals<'a> {
    /// Of this seed.
    #[must_use]
    pub fn new(corpus: &'a Corpus, lengths: Lengths, seed: u64) -> Self {
        Self { corpus, lengths, random: StdRng::seed_from_u64(seed) }
    }

    /// The next request.
    ///
    /// # Errors
    /// When the text is too short.
    pub fn next_wanted(&mut self) -> anyhow::Result<Wanted> {
        let prompt_len = self.length(self.lengths.prompt)?;
        let num_tokens = self.length(self.lengths.output)?;
        Ok(Wanted { prompt: self.corpus.piece(prompt_len, &mut self.random)?, num_tokens })
    }

    /// Time until the next request of a Poisson process.
    ///
    /// # Errors
    /// When the rate is not positive.
    pub fn next_gap(&mut self, per_second: f64) -> anyhow::Result<Duration> {
        Ok(Duration::from_secs_f64(Exp::new(per_second)?.sample(&mut self.random)))
    }

    fn length(&mut self, median: usize) -> anyhow::Result<usize> {
        let lengths = LogNormal::new(ln(median as f64), LENGTH_SIGMA)?;
        let length = lengths.sample(&mut self.random).round() as usize;
        Ok(length.clamp(2, self.lengths.most))
    }
}
