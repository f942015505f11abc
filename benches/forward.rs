//! Whole forward passes of a network without an engine, by rows: of one sequence, of as many
//! sequences, and of prompts; beside what reading the weights and multiplying with them take at
//! least on this machine. All row counts run in turn within each round; medians and the span over
//! rounds are printed.
//!
//! `cargo bench -p slipstream-benches --bench forward -- --help`

use std::io::Write;

use clap::Parser;
use slipstream_benches::network::{CONTEXT_LEN, Network, NetworkArgs, Rows};
use slipstream_benches::roofline::Roofline;
use slipstream_benches::stats::Spread;
use slipstream_model::batch::RaggedBatch;

/// Rows of decoding and verifying.
const NUM_ROWS: [usize; 7] = [1, 2, 3, 4, 5, 8, 16];
/// Rows of prompts.
const PROMPT_LENS: [usize; 2] = [32, 512];

#[derive(Parser)]
#[command(about = "Whole forward passes by rows, beside the roofline")]
struct Args {
    #[command(flatten)]
    network: NetworkArgs,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the table.
struct Line {
    label: String,
    batch: RaggedBatch,
    ms: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse().network;
    let mut out = std::io::stdout().lock();
    let roofline = Roofline::measure(args.threads())?;
    write!(out, "{roofline}")?;
    args.for_each(|mut network| {
        writeln!(out, "\n{}", network.description)?;
        let lines = measure(&mut network, args.rounds())?;
        write_table(&mut out, &network, &roofline, &lines)
    })
}

/// Runs all settings in turn, after one round to warm up.
fn measure(network: &mut Network, rounds: usize) -> anyhow::Result<Vec<Line>> {
    let one = NUM_ROWS.map(Rows::One).into_iter();
    // One row of one sequence is there already.
    let each = NUM_ROWS[1..].iter().map(|num| Rows::Each(*num));
    let prompts = PROMPT_LENS.map(Rows::Prompt);
    let fitting = one.chain(each).chain(prompts).filter_map(|rows| {
        let batch = network.batch(rows)?;
        Some(Line { label: rows.label(), batch, ms: Vec::new() })
    });
    let mut lines: Vec<Line> = fitting.collect();
    for round in 0..=rounds {
        for line in &mut lines {
            let taken = network.pass(&line.batch)?;
            if round > 0 {
                line.ms.push(taken);
            }
        }
    }
    Ok(lines)
}

fn write_table(
    out: &mut impl Write,
    network: &Network,
    roofline: &Roofline,
    lines: &[Line],
) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<16}{:>9} {:>17}{:>11}{:>10}{:>10}{:>9}{:>11}",
        format!("behind {CONTEXT_LEN}"),
        "ms",
        "(min-max)",
        "t(n)/t(1)",
        "tokens/s",
        "bytes ms",
        "MACs ms",
        "% of roof"
    )?;
    let one = lines.first().map_or(f64::NAN, |line| Spread::of(&line.ms).median);
    for Line { label, batch, ms } in lines {
        let Spread { min, median, max } = Spread::of(ms);
        let [bytes_ms, macs_ms] = network.least_ms(roofline, batch)?;
        writeln!(
            out,
            "{label:<16}{median:>9.3} {:>17}{:>11.2}{:>10.1}{bytes_ms:>10.3}{macs_ms:>9.3}\
             {:>11.0}",
            format!("({min:.3}-{max:.3})"),
            median / one,
            1000.0 * batch.num_rows() as f64 / median,
            100.0 * bytes_ms.max(macs_ms) / median,
        )?;
    }
    Ok(())
}
