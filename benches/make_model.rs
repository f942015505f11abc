//! Writes a random checkpoint in the shape of a published model, to measure with: here and, as any
//! reader of GGUF loads it, with peers.
//!
//! `cargo run --release -p slipstream-benches --bin make-model -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use slipstream_benches::checkpoint::{Format, Shape, checkpoint, write};

#[derive(Parser)]
#[command(about = "Writes a random checkpoint in the shape of a published model")]
struct Args {
    /// Shape
    #[arg(long, value_enum)]
    shape: Shape,
    /// Format of the matrices
    #[arg(long, value_enum, default_value = "q8_0")]
    format: Format,
    /// GGUF file to write; must not exist yet
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let begun = Instant::now();
    let file = checkpoint(args.shape, args.format);
    let (weights, bytes) = (file.num_weights() as f64 / 1e6, file.num_bytes() as f64 / 1e9);
    write(file, &args.out)?;
    let (shown, seconds) = (args.out.display(), begun.elapsed().as_secs_f64());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{shown}: {weights:.0} million weights, {bytes:.3} GB, in {seconds:.1} s")?;
    Ok(())
}
