//! What the kernels reach beside what the machine could: matrix products with cold weights, by
//! format, implementation and rows; attention by context, rows and type of keys and values. All row
//! counts run in turn within each round; medians and the span over rounds are printed.
//!
//! `cargo bench -p slipstream-benches --bench kernels -- --help`

use std::io::Write;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use half::f16;
use slipstream_benches::checkpoint::Shape;
use slipstream_benches::roofline::Roofline;
use slipstream_benches::stats::Spread;
use slipstream_model::attention::{Attention, AttentionScratch, RowPlace};
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::compute::{Compute, InputRows};
use slipstream_model::config::LlamaConfig;
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kernels::peak::Mix;
use slipstream_model::kernels::team::Team;
use slipstream_model::kv_pool::{KvPool, KvPoolOptions, KvType, Slot};
use slipstream_model::linear::{Linear, Product, multiply};
use slipstream_model::weights::{Matrix, MatrixData};

/// The feed-forward product of TinyLlama's shape.
const IN_LEN: usize = 2048;
const OUT_LEN: usize = 5632;
/// Copies of the matrix: in turn, they are in no cache when they are needed again.
const NUM_COPIES: usize = 24;
/// Rows of products.
const PRODUCT_ROWS: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 64, 512];
/// Rows of attention.
const ATTENTION_ROWS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];
/// Sequences of one row each.
const NUM_SEQUENCES: usize = 16;
/// Positions before the first row.
const CONTEXTS: [usize; 3] = [128, 1024, 4096];
/// Keys and values that are read in turn, at least, so that none are in a cache.
const KV_BYTES_MIN: usize = 256 << 20;

#[derive(Parser)]
#[command(about = "What the kernels reach beside what the machine could")]
struct Args {
    /// Rounds; each measures every setting once
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// A short run: 3 rounds, the chosen implementation only, no 512 rows, no long context
    #[arg(long)]
    quick: bool,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn rounds(&self) -> usize {
        if self.quick { self.rounds.min(3) } else { self.rounds }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores);
    let mut out = std::io::stdout().lock();
    let roofline = Roofline::measure(threads)?;
    writeln!(out, "{roofline}")?;
    for format in [Format::Q8_0, Format::Q4_0, Format::F16] {
        let matrices = format.matrices()?;
        for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Plain) {
            // Floats run on the same kernels everywhere.
            let is_chosen = isa == Isa::detect();
            if !is_chosen && (args.quick || format == Format::F16) {
                continue;
            }
            let mut products = Products::new(&matrices, isa, threads)?;
            let times = products.measure(&args);
            let bytes = matrices.first().map_or(0, Linear::num_bytes) as f64;
            let label = format!("{}, {}, {threads} threads", format.name(), isa.name());
            writeln!(out, "product {IN_LEN} -> {OUT_LEN}, {label}, weights cold")?;
            let floor = |rows: usize| {
                let macs = (rows * IN_LEN * OUT_LEN) as f64;
                anyhow::Ok(roofline.read_ms(bytes).max(roofline.macs_ms(
                    isa,
                    format.mix(),
                    macs,
                )?))
            };
            write_products(&mut out, &times, bytes, floor)?;
        }
    }
    for kv_type in [KvType::F32, KvType::F16] {
        let num_contexts = if args.quick { 2 } else { CONTEXTS.len() };
        for &context in &CONTEXTS[..num_contexts] {
            let lines = measure_attention(&args, threads, kv_type, context)?;
            writeln!(
                out,
                "attention of one layer, 32 heads, 4 of keys and values, 64 wide, {}, context \
                 {context}, cold",
                kv_type.name()
            )?;
            write_attention(&mut out, &roofline, &lines)?;
        }
    }
    Ok(())
}

/// What weights are held in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Q8_0,
    Q4_0,
    F16,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "4-bit",
            Self::F16 => "f16",
        }
    }

    fn mix(self) -> Mix {
        match self {
            Self::Q8_0 => Mix::Q8_0,
            Self::Q4_0 => Mix::Q4_0,
            Self::F16 => Mix::Floats,
        }
    }

    /// Copies of one matrix. What the numbers are changes no time.
    fn matrices(self) -> anyhow::Result<Vec<Linear>> {
        let num_weights = IN_LEN * OUT_LEN;
        let scales = vec![f16::from_f32(0.01); num_weights / 32];
        let bytes = (0..num_weights).map(|index| ((index as u64 * 40503) >> 7) as u8);
        let data = match self {
            Self::Q8_0 => MatrixData::Q8_0 { scales, quants: bytes.map(u8::cast_signed).collect() },
            Self::Q4_0 => MatrixData::Q4_0 { scales, quants: bytes.step_by(2).collect() },
            Self::F16 => {
                MatrixData::F16(bytes.map(|byte| f16::from_f32(f32::from(byte) / 256.0)).collect())
            }
        };
        let copy = |_| {
            let matrix = Matrix { out_len: OUT_LEN, in_len: IN_LEN, data: data.clone() };
            Linear::pack("matrix", matrix, [OUT_LEN, IN_LEN])
        };
        (0..NUM_COPIES).map(copy).collect::<Result<_, _>>().context("packing a matrix")
    }
}

/// Milliseconds of one row count, one number per round.
struct Times {
    rows: usize,
    ms: Vec<f64>,
}

/// Products with copies of a matrix in turn.
struct Products<'a> {
    matrices: &'a [Linear],
    compute: Compute,
    input: InputRows,
    out: Vec<f32>,
    next: usize,
}

impl<'a> Products<'a> {
    fn new(matrices: &'a [Linear], isa: Isa, threads: usize) -> anyhow::Result<Self> {
        let mut compute = Compute::new(isa, threads)?;
        compute.share_products_from(0);
        Ok(Self { matrices, compute, input: InputRows::new(), out: Vec::new(), next: 0 })
    }

    fn measure(&mut self, args: &Args) -> Vec<Times> {
        let all = PRODUCT_ROWS.iter().filter(|rows| !args.quick || **rows <= 64);
        let mut times: Vec<Times> = all.map(|&rows| Times { rows, ms: Vec::new() }).collect();
        for round in 0..=args.rounds() {
            for Times { rows, ms } in &mut times {
                let taken = self.run(*rows);
                if round > 0 {
                    ms.push(taken);
                }
            }
        }
        times
    }

    /// Milliseconds of a product with what comes before it in a network: its input was just written
    /// and is quantised first. The mean of some, because one is short.
    fn run(&mut self, rows: usize) -> f64 {
        let repeats = (64 / rows).clamp(1, 12);
        self.out.resize(rows * OUT_LEN, 0.0);
        let mut taken_ms = 0.0;
        for _ in 0..repeats {
            for (index, number) in self.input.write(rows, IN_LEN).iter_mut().enumerate() {
                *number = (index % 251) as f32 / 251.0 - 0.5;
            }
            let matrix = &self.matrices[self.next];
            self.next = (self.next + 1) % self.matrices.len();
            let start = Instant::now();
            let product = Product::store(matrix, &mut self.out);
            multiply(&mut self.compute, &mut self.input, [product]);
            taken_ms += start.elapsed().as_nanos() as f64 / 1e6;
        }
        taken_ms / f64::from(repeats as u32)
    }
}

/// `floor` is the least time that so many rows can take, in milliseconds.
fn write_products(
    out: &mut impl Write,
    times: &[Times],
    bytes: f64,
    floor: impl Fn(usize) -> anyhow::Result<f64>,
) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:>6}{:>10} {:>17}{:>11}{:>9}{:>10}{:>12}",
        "rows", "ms", "(min-max)", "t(n)/t(1)", "GB/s", "GMAC/s", "% of roof"
    )?;
    let one = times.first().map_or(f64::NAN, |times| Spread::of(&times.ms).median);
    for Times { rows, ms } in times {
        let Spread { min, median, max } = Spread::of(ms);
        let macs = (rows * IN_LEN * OUT_LEN) as f64;
        writeln!(
            out,
            "{rows:>6}{median:>10.3} {:>17}{:>11.2}{:>9.1}{:>10.1}{:>12.0}",
            format!("({min:.3}-{max:.3})"),
            median / one,
            bytes / median / 1e6,
            macs / median / 1e6,
            100.0 * floor(*rows)? / median,
        )?;
    }
    writeln!(out)?;
    Ok(())
}

/// Attention over a pool whose layers are read in turn.
struct Layers {
    pool: KvPool,
    num_layers: usize,
    next: usize,
    isa: Isa,
    team: Team,
    config: LlamaConfig,
    scratch: AttentionScratch,
    out: Vec<f32>,
}

/// One setting of attention.
struct Line {
    label: String,
    batch: RaggedBatch,
    places: Vec<RowPlace>,
    queries: Vec<f32>,
    /// Keys and values that its rows see, each sequence's once.
    kv_bytes: f64,
    ms: Vec<f64>,
}

impl Line {
    /// `num_sequences` of `num_rows` each behind `context` positions.
    fn new(config: &LlamaConfig, num_sequences: usize, num_rows: usize, context: usize) -> Self {
        let blocks_each = (context + num_rows).div_ceil(BLOCK_LEN);
        let mut batch = RaggedBatch::new();
        let mut places = Vec::new();
        for segment in 0..num_sequences {
            let first = segment * blocks_each;
            let blocks: Vec<BlockId> =
                (first..first + blocks_each).map(|block| BlockId(block as u32)).collect();
            batch.push(SegmentInput {
                tokens: &vec![TokenId(0); num_rows],
                start: context,
                block_table: &blocks,
                logits_from: 0,
                owner: segment as u64,
                scope: 0,
            });
            let positions = context..context + num_rows;
            places.extend(positions.map(|position| RowPlace { segment, position }));
        }
        let queries = places.len() * config.query_len();
        let queries = (0..queries).map(|index| (index % 127) as f32 / 127.0 - 0.5).collect();
        let numbers = 2 * num_sequences * (context + num_rows) * config.kv_len();
        let label = match num_sequences {
            1 => format!("{num_rows} of one"),
            _ => format!("1 of each of {num_sequences}"),
        };
        Self { label, batch, places, queries, kv_bytes: numbers as f64, ms: Vec::new() }
    }
}

impl Layers {
    /// Pools hold blocks for one or for all sequences.
    fn new(threads: usize, kv_type: KvType, num_blocks: usize) -> anyhow::Result<Self> {
        let mut config = Shape::TinyLlama.config();
        let block_bytes = 2 * BLOCK_LEN * config.kv_len() * kv_type.num_bytes();
        config.num_layers = KV_BYTES_MIN.div_ceil(num_blocks * block_bytes).max(2);
        let isa = Isa::detect();
        let pool = KvPool::new(&config, KvPoolOptions { num_blocks, kv_type, isa });
        let mut pool = pool.ok().context("no memory for keys and values")?;
        let row: Vec<f32> = (0..config.kv_len()).map(|i| (i % 61) as f32 / 61.0 - 0.5).collect();
        for layer in 0..config.num_layers {
            for position in 0..num_blocks * BLOCK_LEN {
                let block = BlockId((position / BLOCK_LEN) as u32);
                pool.write(layer, Slot { block, offset: position % BLOCK_LEN }, &row, &row);
            }
        }
        let (num_layers, team) = (config.num_layers, Team::new(threads)?);
        let (scratch, out) = (AttentionScratch::default(), Vec::new());
        Ok(Self { pool, num_layers, next: 0, isa, team, config, scratch, out })
    }

    /// Milliseconds per layer, the mean of some.
    fn run(&mut self, line: &Line) -> f64 {
        let repeats = self.num_layers.min(22);
        self.out.resize(line.queries.len(), 0.0);
        let start = Instant::now();
        for _ in 0..repeats {
            let attention = Attention {
                isa: self.isa,
                pool: &self.pool,
                layer: self.next,
                batch: &line.batch,
                places: &line.places,
                queries: &line.queries,
                head_dim: self.config.head_dim,
                group_len: self.config.group_len(),
                scratch: &mut self.scratch,
            };
            attention.run(&mut self.team, &mut self.out);
            self.next = (self.next + 1) % self.num_layers;
        }
        start.elapsed().as_nanos() as f64 / 1e6 / f64::from(repeats as u32)
    }
}

/// Rows of one sequence, then one row of many.
fn measure_attention(
    args: &Args,
    threads: usize,
    kv_type: KvType,
    context: usize,
) -> anyhow::Result<Vec<Line>> {
    let rows_max = ATTENTION_ROWS.iter().max().copied().unwrap_or(1);
    let blocks = |num_rows: usize| (context + num_rows).div_ceil(BLOCK_LEN);
    let mut one = Layers::new(threads, kv_type, blocks(rows_max))?;
    let mut many = Layers::new(threads, kv_type, NUM_SEQUENCES * blocks(1))?;
    let config = Shape::TinyLlama.config();
    let mut lines: Vec<Line> =
        ATTENTION_ROWS.iter().map(|rows| Line::new(&config, 1, *rows, context)).collect();
    lines.push(Line::new(&config, NUM_SEQUENCES, 1, context));
    for line in &mut lines {
        line.kv_bytes *= kv_type.num_bytes() as f64;
    }
    for round in 0..=args.rounds() {
        for line in &mut lines {
            let is_one = line.batch.segments().len() == 1;
            let taken = if is_one { one.run(line) } else { many.run(line) };
            if round > 0 {
                line.ms.push(taken);
            }
        }
    }
    Ok(lines)
}

fn write_attention(
    out: &mut impl Write,
    roofline: &Roofline,
    lines: &[Line],
) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<16}{:>10} {:>17}{:>11}{:>9}{:>12}",
        "rows", "ms", "(min-max)", "t(n)/t(1)", "GB/s", "% of read"
    )?;
    let one = lines.first().map_or(f64::NAN, |line| Spread::of(&line.ms).median);
    for Line { label, kv_bytes, ms, .. } in lines {
        let Spread { min, median, max } = Spread::of(ms);
        writeln!(
            out,
            "{label:<16}{median:>10.4} {:>17}{:>11.2}{:>9.1}{:>12.0}",
            format!("({min:.4}-{max:.4})"),
            median / one,
            kv_bytes / median / 1e6,
            100.0 * roofline.read_ms(*kv_bytes) / median,
        )?;
    }
    writeln!(out)?;
    Ok(())
}
