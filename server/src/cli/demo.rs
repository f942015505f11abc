//! `slipstream demo`: a server of its own, prompts through a real gRPC client, plain beside
//! speculative. Prints what it measured, whatever that is.

use std::io::{self, Write};
use std::time::Instant;

use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_request::Prompt;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::client::{self, Completion};
use super::compare::{Difference, first_difference};
use super::generate::write_tokens;
use super::request_flags::{auto, off};
use super::terminal::{Attribution, Palette, write_table};
use super::{PROPOSING_TOKENS_MIN, comparison_config};
use crate::config::{ConfigError, FileFlag, ModelFlags, wants_colour};
use crate::local::LocalServer;

/// Streams that share the server in the last row of the table.
const BATCH: usize = 8;
/// Seed of the sampled prompts; any other would do.
const SEED: u64 = 7;

/// Flags of `slipstream demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Runs on the embedded pair unless --model and --draft-model name another. Streams five prompts of \
Rust code, three greedy and two sampled, over gRPC from a server on a free loopback port; then \
measures each of them plain and speculative, alone and eight at once, --repeats times.")]
pub(super) struct DemoFlags {
    /// Output tokens per completion, 3 or more
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 96,
        value_parser = clap::value_parser!(u16).range(PROPOSING_TOKENS_MIN..)
    )]
    tokens: u16,
    /// Measurements of each kind; the table shows their medians
    #[arg(
        long,
        value_name = "N",
        default_value_t = 5,
        value_parser = clap::value_parser!(u8).range(1..)
    )]
    repeats: u8,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    file: FileFlag,
}

/// A prompt and how to continue it.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    prompt: &'static str,
    temperature: f64,
}

const CASES: [Case; 5] = [
    Case { name: "main", prompt: "fn main() {\n    let mut", temperature: 0.0 },
    Case {
        name: "display",
        prompt: "impl fmt::Display for Error {\n    fn fmt(&self, f: &mut fmt::Formatter<'_>)",
        temperature: 0.0,
    },
    Case { name: "struct", prompt: "#[derive(Clone, Debug)]\npub struct", temperature: 0.0 },
    Case { name: "imports", prompt: "use std::collections::HashMap;\nuse std::", temperature: 0.8 },
    Case {
        name: "tests",
        prompt: "#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    fn",
        temperature: 0.8,
    },
];

/// Runs the demonstration.
pub(super) async fn run(flags: DemoFlags) -> anyhow::Result<()> {
    let config = comparison_config(&flags.model)?;
    if config.engine.draft_len_auto == 0 {
        let problem = "0 never proposes, so there is nothing to compare: give 1 to 8";
        return Err(ConfigError::new("draft-len", problem).into());
    }
    let palette = Palette { colour: wants_colour() };
    writeln!(io::stdout(), "Starting a server on a free loopback port ...")?;
    let begun = Instant::now();
    let server = LocalServer::start(config).await?;
    writeln!(
        io::stdout(),
        "Ready at http://{} after {:.1} s. Every token below came over gRPC.\n",
        server.address(),
        begun.elapsed().as_secs_f64()
    )?;
    let demo = Demo {
        client: client::client(server.channel()),
        max_tokens: i32::from(flags.tokens),
        repeats: usize::from(flags.repeats),
        palette,
    };
    demo.show().await?;
    let is_same = demo.measure().await?;
    server.stop().await?;
    if !is_same {
        anyhow::bail!("speculation changed an output: please report this with the lines above");
    }
    write_next_steps(palette)?;
    Ok(())
}

struct Demo {
    client: CompletionsClient<Channel>,
    max_tokens: i32,
    repeats: usize,
    palette: Palette,
}

/// One way of answering, measured.
#[derive(Debug, Default)]
struct Sample {
    first_token_ms: Vec<f64>,
    tokens_per_second: Vec<f64>,
    proposed: u32,
    accepted: u32,
    steps: u32,
    tokens: usize,
}

impl Sample {
    fn add(&mut self, completion: &Completion) {
        let speculation = completion.speculation();
        self.first_token_ms.push(completion.first_token.as_secs_f64() * 1000.0);
        self.tokens_per_second.extend(completion.tokens_per_second());
        self.proposed += speculation.proposed;
        self.accepted += speculation.accepted;
        self.steps += speculation.steps;
        self.tokens += completion.tokens.len();
    }
}

impl Demo {
    fn request(&self, case: Case, seed: u64, mode: v1::Speculation) -> v1::GenerateRequest {
        v1::GenerateRequest {
            prompt: Some(Prompt::Text(case.prompt.to_owned())),
            max_tokens: Some(self.max_tokens),
            temperature: Some(case.temperature),
            seed: Some(seed),
            speculation: Some(mode),
            token_bytes: true,
            // Every round asks the same, and shall pay for it.
            no_prefix_reuse: true,
            ..v1::GenerateRequest::default()
        }
    }

    /// Streams every prompt once, as it comes. Serves as the warm-up, too.
    async fn show(&self) -> anyhow::Result<()> {
        if let Some(legend) = self.palette.legend() {
            writeln!(io::stdout(), "{legend}\n")?;
        }
        for case in CASES {
            let how = if case.temperature == 0.0 { "greedy" } else { "sampled" };
            writeln!(io::stdout(), "{}", self.palette.bold(&format!("-- {} ({how})", case.name)))?;
            write!(io::stdout(), "{}", self.palette.dim(case.prompt))?;
            io::stdout().flush()?;
            let mut attribution = Attribution::default();
            let request = self.request(case, SEED, auto());
            client::stream(self.client.clone(), request, |event| {
                write_tokens(event, &mut attribution, self.palette)
            })
            .await?;
            writeln!(io::stdout(), "\n")?;
        }
        Ok(())
    }

    /// Measures every prompt alone and all of them together. Returns whether all bytes agreed.
    async fn measure(&self) -> anyhow::Result<bool> {
        writeln!(io::stdout(), "Measuring, medians of {} ...\n", self.repeats)?;
        let mut rows = Vec::new();
        for case in CASES {
            let requests = |mode: v1::Speculation| vec![self.request(case, SEED, mode)];
            rows.push(self.row(case.name, Some(case.temperature), requests).await?);
        }
        let together = |mode: v1::Speculation| {
            let cases = CASES.iter().cycle().take(BATCH).enumerate();
            cases.map(|(index, case)| self.request(*case, SEED + index as u64, mode)).collect()
        };
        rows.push(self.row(&format!("{BATCH} at once"), None, together).await?);
        write_report(&mut io::stdout().lock(), &rows)?;
        Ok(rows.iter().all(|row| row.difference.is_none()))
    }

    /// Measures plain and speculative in turn, so that both see the same machine.
    async fn row(
        &self,
        name: &str,
        temperature: Option<f64>,
        requests: impl Fn(v1::Speculation) -> Vec<v1::GenerateRequest>,
    ) -> anyhow::Result<Row> {
        let mut row = Row { name: name.to_owned(), temperature, ..Row::default() };
        for _ in 0..self.repeats {
            let plain = self.answers(requests(off()), &mut row.plain).await?;
            let speculative = self.answers(requests(auto()), &mut row.speculative).await?;
            let mut found = plain.iter().zip(&speculative);
            let found = found.find_map(|(one, other)| first_difference(one, other));
            row.difference = row.difference.or(found);
        }
        Ok(row)
    }

    /// Answers requests at the same time. Several count as one rate: all tokens over all the time.
    async fn answers(
        &self,
        requests: Vec<v1::GenerateRequest>,
        sample: &mut Sample,
    ) -> anyhow::Result<Vec<Completion>> {
        let num_requests = requests.len();
        let num_rates = sample.tokens_per_second.len();
        let begun = Instant::now();
        let mut calls = JoinSet::new();
        for (index, request) in requests.into_iter().enumerate() {
            let client = self.client.clone();
            calls.spawn(async move { (index, client::stream(client, request, |_| Ok(())).await) });
        }
        let mut answers = vec![Completion::default(); num_requests];
        while let Some(answer) = calls.join_next().await {
            let (index, completion) = answer?;
            answers[index] = completion?;
            sample.add(&answers[index]);
        }
        if num_requests > 1 {
            let tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
            sample.tokens_per_second.truncate(num_rates);
            sample.tokens_per_second.push(tokens as f64 / begun.elapsed().as_secs_f64());
        }
        Ok(answers)
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[len / 2]),
        len => Some(f64::midpoint(sorted[len / 2 - 1], sorted[len / 2])),
    }
}

/// A quotient, where there is one.
fn ratio(numerator: f64, denominator: f64) -> Option<f64> {
    (denominator > 0.0).then(|| numerator / denominator)
}

/// A number with this many decimals and a unit; `-` where there is none.
fn cell(value: Option<f64>, decimals: usize, unit: &str) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.decimals$}{unit}"))
}

fn header() -> Vec<String> {
    let names = [
        "prompt",
        "T",
        "TTFT ms",
        "spec.",
        "tokens/s",
        "spec.",
        "ratio",
        "accepted",
        "tokens/step",
        "same bytes",
    ];
    names.map(str::to_owned).to_vec()
}

/// One line of the table.
#[derive(Debug, Default)]
struct Row {
    name: String,
    /// `None` where several temperatures take part.
    temperature: Option<f64>,
    plain: Sample,
    speculative: Sample,
    difference: Option<Difference>,
}

impl Row {
    fn rates(&self) -> [Option<f64>; 2] {
        [&self.plain, &self.speculative].map(|sample| median(&sample.tokens_per_second))
    }

    /// Speculative over plain.
    fn speedup(&self) -> Option<f64> {
        let [plain, speculative] = self.rates();
        ratio(speculative?, plain?)
    }

    fn cells(&self) -> Vec<String> {
        let Self { plain, speculative, .. } = self;
        let [plain_rate, rate] = self.rates();
        let accepted = f64::from(speculative.accepted) * 100.0;
        vec![
            self.name.clone(),
            self.temperature.map_or("-".to_owned(), |temperature| temperature.to_string()),
            cell(median(&plain.first_token_ms), 2, ""),
            cell(median(&speculative.first_token_ms), 2, ""),
            cell(plain_rate, 0, ""),
            cell(rate, 0, ""),
            cell(self.speedup(), 2, "x"),
            cell(ratio(accepted, f64::from(speculative.proposed)), 0, "%"),
            cell(ratio(speculative.tokens as f64, f64::from(speculative.steps)), 2, ""),
            if self.difference.is_none() { "yes".to_owned() } else { "NO".to_owned() },
        ]
    }
}

/// Writes the table, what it found, and what its columns mean.
fn write_report(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    let mut table = vec![header()];
    table.extend(rows.iter().map(Row::cells));
    write_table(out, &table)?;
    writeln!(
        out,
        "\nTTFT: time from sending the request to its first token, plain and speculative.\n\
         tokens/s: after the first token, by the server's clock; for {BATCH} at once, all tokens\n\
         over the whole time.\n\
         accepted: share of proposed tokens that the verifier chose, too.\n\
         tokens/step: tokens per run of the verifier; plain decoding gives 1.\n"
    )?;
    for row in rows {
        if let Some(difference) = &row.difference {
            writeln!(out, "DIFFERENT in {}: {difference}", row.name)?;
        }
    }
    if rows.iter().all(|row| row.speculative.proposed == 0) {
        return writeln!(out, "Nothing was proposed, so there is nothing to compare.");
    }
    if rows.iter().all(|row| row.difference.is_none()) {
        writeln!(out, "Every completion has the same bytes with speculation and without.")?;
    }
    let speedups: Vec<f64> = rows.iter().filter_map(Row::speedup).collect();
    match speedups.iter().filter(|speedup| **speedup < 1.0).count() {
        0 if speedups.len() < rows.len() => Ok(()), // too short to tell
        0 => writeln!(out, "Speculation was faster in every row."),
        slower => writeln!(
            out,
            "Speculation was slower in {slower} of {} rows: it pays where a run of the verifier\n\
             costs far more than one of the draft, which takes a larger verifier than this one.",
            rows.len()
        ),
    }
}

fn write_next_steps(palette: Palette) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "\n{}", palette.bold("How to go on"))?;
    writeln!(
        out,
        "  slipstream self-test                         the same comparison, systematically\n  \
           slipstream generate 'fn new(' --colour --stats   complete a prompt of your own\n  \
           slipstream serve                             listen on 127.0.0.1:50051\n  \
           slipstream serve --model DIR-OR-GGUF --draft-model DIR-OR-GGUF\n  \
           slipstream generate --server http://127.0.0.1:50051 'use std::'\n\
         Inside the repository, `slipstream` is `cargo run --release --`."
    )
}
