//! What every stage of a forward pass costs by rows, what a pass spends outside its stages, and
//! choosing tokens behind it. What an engine spends beside both is in the bench `overhead`. All row
//! counts run in turn within each round; medians are printed, and the span of whole passes.
//!
//! `cargo bench -p slipstream-benches --bench step -- --help`

use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use clap::Parser;
use slipstream_benches::network::{CONTEXT_LEN, Network, NetworkArgs, Rows};
use slipstream_benches::roofline::Roofline;
use slipstream_benches::stats::Spread;
use slipstream_model::batch::RaggedBatch;
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_model::stage_times::Stage;

/// Rows of one sequence.
const NUM_ROWS: [usize; 7] = [1, 2, 3, 4, 5, 8, 16];
/// Time that a measurement takes about, in milliseconds: it repeats what is shorter.
const SAMPLE_MS: f64 = 5.0;

#[derive(Parser)]
#[command(about = "What every stage of a forward pass costs by rows")]
struct Args {
    #[command(flatten)]
    network: NetworkArgs,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// Microseconds of one row count, one number per round each.
#[derive(Default)]
struct Column {
    batch: RaggedBatch,
    num_rows: usize,
    /// Whole passes, nothing collected.
    pass_us: Vec<f64>,
    /// As [`Stage::ALL`].
    stages_us: [Vec<f64>; Stage::ALL.len()],
    /// What passes take beside their stages.
    outside_us: Vec<f64>,
    greedy_us: Vec<f64>,
    sampled_us: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse().network;
    let mut out = std::io::stdout().lock();
    write!(out, "{}", Roofline::measure(args.threads())?)?;
    args.for_each(|mut network| {
        let columns = measure(&mut network, args.rounds())?;
        writeln!(out, "\n{}", network.description)?;
        write_table(&mut out, &columns)
    })
}

/// Runs all row counts in turn, after one round to warm up.
fn measure(network: &mut Network, rounds: usize) -> anyhow::Result<Vec<Column>> {
    let fitting = NUM_ROWS.into_iter().filter_map(|num_rows| {
        let batch = network.batch(Rows::One(num_rows))?;
        Some(Column { batch, num_rows, ..Column::default() })
    });
    let mut columns: Vec<Column> = fitting.collect();
    let mut chooser = Chooser::new();
    for round in 0..=rounds {
        for column in &mut columns {
            let mut warmup = Column { batch: column.batch.clone(), ..Column::default() };
            let column = if round == 0 { &mut warmup } else { column };
            column.measure_passes(network)?;
            column.measure_choices(network, &mut chooser)?;
        }
    }
    Ok(columns)
}

impl Column {
    fn measure_passes(&mut self, network: &mut Network) -> anyhow::Result<()> {
        let first_ms = network.pass(&self.batch)?;
        let repeats = (SAMPLE_MS / first_ms).clamp(1.0, 100.0).round();
        let mean_us = |network: &mut Network| -> anyhow::Result<f64> {
            let mut total_ms = 0.0;
            for _ in 0..repeats as usize {
                total_ms += network.pass(&self.batch)?;
            }
            Ok(1000.0 * total_ms / repeats)
        };
        self.pass_us.push(mean_us(network)?);
        network.transformer.collect_stage_times(true);
        let collecting_us = mean_us(network)?;
        let times = *network.transformer.stage_times();
        network.transformer.collect_stage_times(false);
        for (stage, us) in Stage::ALL.into_iter().zip(&mut self.stages_us) {
            us.push(times.of(stage).as_nanos() as f64 / 1000.0 / repeats);
        }
        self.outside_us.push(collecting_us - times.total().as_nanos() as f64 / 1000.0 / repeats);
        Ok(())
    }

    /// Chooses a token for every row of the last pass.
    fn measure_choices(&mut self, network: &Network, chooser: &mut Chooser) -> anyhow::Result<()> {
        let greedy = SamplingParams { seed: 7, ..SamplingParams::greedy() };
        let sampled = SamplingParams { temperature: 0.8, ..greedy.clone() };
        let history: Vec<TokenId> = (0..CONTEXT_LEN as u32).map(TokenId).collect();
        let logits = network.logits();
        for (params, us) in [(greedy, &mut self.greedy_us), (sampled, &mut self.sampled_us)] {
            let context = ChoiceContext {
                params: &params,
                history: &history,
                ahead: &[],
                prompt_len: history.len(),
                sharpening: 1.0,
            };
            let start = Instant::now();
            for row in 0..logits.num_rows() {
                black_box(chooser.choose(logits.row(row), &context)?);
            }
            us.push(start.elapsed().as_nanos() as f64 / 1000.0);
        }
        Ok(())
    }
}

fn write_table(out: &mut impl Write, columns: &[Column]) -> anyhow::Result<()> {
    let mut line = |name: &str, cell: &dyn Fn(&Column) -> String| {
        let cells: String = columns.iter().map(|column| format!("{:>12}", cell(column))).collect();
        writeln!(out, "{name:<20}{cells}")
    };
    let median = |us: &[f64]| format!("{:.1}", Spread::of(us).median);
    line("us, by rows", &|column| column.num_rows.to_string())?;
    for (index, stage) in Stage::ALL.into_iter().enumerate() {
        line(stage.name(), &|column| median(&column.stages_us[index]))?;
    }
    line("outside the stages", &|column| median(&column.outside_us))?;
    line("whole pass", &|column| median(&column.pass_us))?;
    line("   least", &|column| format!("{:.1}", Spread::of(&column.pass_us).min))?;
    line("   most", &|column| format!("{:.1}", Spread::of(&column.pass_us).max))?;
    let one = columns.first().map_or(f64::NAN, |column| Spread::of(&column.pass_us).median);
    line("   t(n)/t(1)", &|column| format!("{:.2}", Spread::of(&column.pass_us).median / one))?;
    line("choices, greedy", &|column| median(&column.greedy_us))?;
    line("choices, T 0.8", &|column| median(&column.sampled_us))?;
    Ok(())
}
