//! `slipstream grow`: a larger model with the function of a small one, as a GGUF file, so that the
//! cost of a large verifier can be measured with real text and real acceptance. `--check` compares
//! the two.

use std::fmt;
use std::fs::Permissions;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use slipstream_model::load::{LoadOptions, LoadedModel, WeightFormat, load, tokenizer_keys};
use slipstream_model::write::grow::grown;
use slipstream_model::write::shape::Growth;
use slipstream_model::write::{Metadata, MetadataValue, NetworkFile};

use super::grow_check;
use crate::config::ModelFlags;
use crate::startup::model_source;

/// Mode of the written file, before the umask.
const FILE_MODE: u32 = 0o666;
/// Bytes of a GB.
const GB: f64 = 1e9;

/// Flags of `slipstream grow`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
The written file has extra layers, heads, feed-forward units and hidden dimensions that cost what \
such parts cost and cannot reach the output: it says exactly what the source says (held as Q8_0), \
more slowly. Figures measured with it are those of a grown model, and should be called so. Other \
readers of GGUF files load it, too.

Examples:
  slipstream grow --out big.gguf --params 1.1b
  slipstream grow --check big.gguf
  slipstream grow --out wide.gguf --model small.gguf --hidden-factor 4 --ffn 4096 --layers 12
  slipstream serve --model big.gguf --draft-model embedded")]
pub(super) struct GrowFlags {
    /// File to write; must not exist yet
    #[arg(long, value_name = "FILE", required_unless_present = "check", conflicts_with = "check")]
    out: Option<PathBuf>,
    /// Compare this grown file with the model that it was grown from, token by token
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// Model to grow: a GGUF file, a Hugging Face directory, or `embedded`
    #[arg(long, value_name = "PATH", env = "SLIPSTREAM_MODEL")]
    model: Option<String>,
    #[command(flatten)]
    size: SizeFlags,
    /// Seed of the random weights
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    check_flags: grow_check::CheckFlags,
}

/// How large the grown model is.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Size")]
struct SizeFlags {
    /// Weights altogether, about, like 0.3b, 1.1b or 300m: chooses all that is not given below
    #[arg(long, value_name = "COUNT")]
    params: Option<WeightCount>,
    /// Multiplies the hidden size: 1, 4 or 16 [default: 1]
    #[arg(long, value_name = "FACTOR")]
    hidden_factor: Option<usize>,
    /// Layers [default: the source's]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Feed-forward width [default: the source's]
    #[arg(long, value_name = "N")]
    ffn: Option<usize>,
    /// Query heads [default: the source's]
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads [default: the source's]
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
}

/// A number of weights, written like `1.1b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WeightCount(u64);

impl FromStr for WeightCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let units = [("b", 1e9), ("m", 1e6), ("k", 1e3), ("", 1.0)];
        let parsed = units.iter().find_map(|(unit, factor)| {
            let number: f64 = lower.strip_suffix(unit)?.parse().ok()?;
            let count = (number * factor).round();
            (1.0..1e15).contains(&count).then_some(count as u64)
        });
        parsed.map(Self).ok_or_else(|| format!("must be a count like 1.1b or 300m, got {text:?}"))
    }
}

/// Ctrl-c ended the command.
#[derive(Debug)]
pub(super) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted; nothing was written")
    }
}

impl std::error::Error for Interrupted {}

/// Writes or compares, on a thread of its own.
pub(super) async fn run(flags: GrowFlags) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let mut work = tokio::task::spawn_blocking(move || work(&flags, &seen));
    loop {
        tokio::select! {
            ended = &mut work => return ended?,
            signal = tokio::signal::ctrl_c() => {
                signal?;
                stop.store(true, Ordering::Relaxed);
            }
        }
    }
}

fn work(flags: &GrowFlags, stop: &AtomicBool) -> anyhow::Result<()> {
    match (&flags.check, &flags.out) {
        (Some(file), _) => {
            let source = Source::load(flags)?;
            grow_check::run(source.model, file, &flags.check_flags, stop)
        }
        (None, Some(out)) => {
            check_free_name(out)?;
            write(flags, out, stop)
        }
        (None, None) => bail!("--out or --check is needed"),
    }
}

/// The model to grow, and what goes over into the file as it is.
struct Source {
    model: LoadedModel,
    keys: Metadata,
}

impl Source {
    fn load(flags: &GrowFlags) -> anyhow::Result<Self> {
        let models = ModelFlags { model: flags.model.clone(), ..ModelFlags::default() };
        let (source, from) = model_source(&models)?;
        let options = LoadOptions { format: Some(WeightFormat::Q8_0), ..LoadOptions::default() };
        let model = load(source.clone(), &options, &mut |_| {});
        let model = model.with_context(|| format!("cannot load {from}"))?;
        let keys = tokenizer_keys(&source, &model.tokenizer);
        Ok(Self { keys: keys.with_context(|| format!("cannot write {from}"))?, model })
    }

    /// Keys of the file beside its architecture.
    fn metadata(&self) -> Metadata {
        let name = &self.model.name;
        let text = |text: String| MetadataValue::String(text);
        let described = format!(
            "{name}, grown: extra parts of random weights that cannot reach the output, written by \
             slipstream grow"
        );
        let mut keys = self.keys.clone();
        keys.push(("general.name".to_owned(), text(format!("{name}, grown"))));
        keys.push(("general.description".to_owned(), text(described)));
        keys
    }
}

impl SizeFlags {
    fn growth(&self, source: &LoadedModel) -> anyhow::Result<Growth> {
        let chosen = match self.params {
            Some(WeightCount(target)) => {
                Growth::to_size(&source.config, source.weights.output.is_none(), target)?
            }
            None => Growth::NONE,
        };
        Ok(Growth {
            hidden_factor: self.hidden_factor.unwrap_or(chosen.hidden_factor),
            num_layers: self.layers.or(chosen.num_layers),
            ffn_len: self.ffn.or(chosen.ffn_len),
            num_heads: self.heads.or(chosen.num_heads),
            num_kv_heads: self.kv_heads.or(chosen.num_kv_heads),
        })
    }
}

fn write(flags: &GrowFlags, out: &Path, stop: &AtomicBool) -> anyhow::Result<()> {
    let begun = Instant::now();
    let source = Source::load(flags)?;
    let growth = flags.size.growth(&source.model)?;
    let file = grown(&source.model, &growth, source.metadata(), flags.seed)?;
    let facts = file.config().clone();
    let (num_weights, num_bytes) = (file.num_weights(), file.num_bytes());
    write_new(file, out, stop)?;
    let config = &source.model.config;
    let mut stdout = io::stdout().lock();
    writeln!(
        stdout,
        "{}: {:.3} billion weights, {:.3} GB, in {:.1} s\n\
         hidden {} -> {}, layers {} -> {}, feed-forward {} -> {}, heads {} -> {}, key/value heads \
         {} -> {}\n\
         the same function as {:?} held as Q8_0; slipstream grow --check {} compares them",
        out.display(),
        num_weights as f64 / 1e9,
        num_bytes as f64 / GB,
        begun.elapsed().as_secs_f64(),
        config.hidden_len,
        facts.hidden_len,
        config.num_layers,
        facts.num_layers,
        config.ffn_len,
        facts.ffn_len,
        config.num_heads,
        facts.num_heads,
        config.num_kv_heads,
        facts.num_kv_heads,
        source.model.name,
        out.display(),
    )?;
    Ok(())
}

/// Refuses a name that is taken before anything is computed. Asked again when the file gets it.
fn check_free_name(out: &Path) -> anyhow::Result<()> {
    if out.symlink_metadata().is_ok() { Err(taken(out)) } else { Ok(()) }
}

fn taken(out: &Path) -> anyhow::Error {
    anyhow!("{} exists already: remove it, or choose another name with --out", out.display())
}

/// Writes a file under a passing name beside its own, which it gets when it is whole: who sees it
/// sees all of it, and nothing is left of one that failed.
fn write_new(file: NetworkFile<'_>, out: &Path, stop: &AtomicBool) -> anyhow::Result<()> {
    let folder = match out.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) | None => Path::new("."),
    };
    let num_bytes = file.num_bytes();
    let room = rustix::fs::statvfs(folder).map_err(io::Error::from);
    let room = room.with_context(|| format!("cannot write into {}", folder.display()))?;
    let free_bytes = room.f_bavail.saturating_mul(room.f_frsize);
    if free_bytes < num_bytes {
        bail!(
            "{} would have {num_bytes} bytes, and {} has room for {free_bytes}: choose a smaller \
             size or another folder",
            out.display(),
            folder.display()
        );
    }
    let mut partial = tempfile::Builder::new()
        .prefix(".slipstream-grow-")
        .suffix(".partial")
        .permissions(Permissions::from_mode(FILE_MODE))
        .tempfile_in(folder)
        .with_context(|| format!("cannot write into {}", folder.display()))?;
    let mut is_stopped = |_| match stop.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let written = file
        .write(partial.as_file_mut(), &mut is_stopped)
        .and_then(|()| partial.as_file().sync_all());
    if stop.load(Ordering::Relaxed) {
        return Err(Interrupted.into());
    }
    written.with_context(|| format!("cannot write {}; nothing is left of it", out.display()))?;
    match partial.persist_noclobber(out) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(taken(out)),
        Err(error) => {
            Err(error.error).with_context(|| format!("cannot name the file {}", out.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::WeightCount;

    #[test]
    fn counts_are_read_with_their_units() {
        let count = |text: &str| text.parse::<WeightCount>().map(|count| count.0);
        assert_eq!(count("1.1b"), Ok(1_100_000_000));
        assert_eq!(count("300M"), Ok(300_000_000));
        assert_eq!(count("12"), Ok(12));
        for wrong in ["", "b", "-1b", "0", "nan", "1e30", "1x"] {
            assert!(count(wrong).is_err(), "{wrong}");
        }
    }
}
