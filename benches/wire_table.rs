//! Owns the table that `wire` prints: ways to reach the engine, their figures, and how far they
//! differ. Knows no server.

use std::io::Write;

use anyhow::Context;
use slipstream_server::engine::request::Speculation;

use crate::label;
use crate::stats::Spread;

/// How a load reaches the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the engine's handle, in this process.
    InProcess,
    /// Over gRPC, all streams on one connection.
    OneConnection,
    /// Over gRPC, every stream on a connection of its own.
    ConnectionEach,
}

/// All of them, the yardstick first.
pub const WAYS: [Way; 3] = [Way::InProcess, Way::OneConnection, Way::ConnectionEach];

impl Way {
    /// What tables call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Way::InProcess => "in-process",
            Way::OneConnection => "gRPC, 1 conn.",
            Way::ConnectionEach => "gRPC, 1 each",
        }
    }
}

/// What one load brought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// All streams together.
    pub tokens_per_s: f64,
    /// Mean over the completions, from the call to the first token in the client's hands. The
    /// median would jump with the step in which a request happens to be admitted.
    pub ttft_ms: f64,
    /// Median part of it that the engine does not know of: the wire and all queues.
    pub outside_ms: f64,
    /// How far events coalesce.
    pub tokens_per_event: f64,
    /// Of all threads of this process: engine, server and clients.
    pub cpu_us_per_token: f64,
}

/// One setting and its figures, one per round.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// How the load reached the engine.
    pub way: Way,
    /// How it speculated.
    pub speculation: Speculation,
    /// Its figures.
    pub rounds: Vec<Figures>,
}

/// Writes what was measured. Differences to the load in this process are taken within each round;
/// their median and span are printed.
///
/// # Errors
/// When `out` does not take it, or a setting lacks its load in this process.
pub fn write_table(out: &mut impl Write, table: &[Measured]) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<8}{:<14}{:>8} {:>15} {:>8} {:>24} {:>8} {:>15} {:>24} {:>8} {:>9} {:>9}",
        "setting",
        "way",
        "tokens/s",
        "(min-max)",
        "x plain",
        "difference",
        "TTFT ms",
        "(min-max)",
        "difference",
        "outside",
        "tok/event",
        "us/token"
    )?;
    for measured in table {
        let find = |way: Way, speculation: Speculation| {
            table.iter().find(|other| other.way == way && other.speculation == speculation)
        };
        let inside = find(Way::InProcess, measured.speculation).context("every way is measured")?;
        let plain = find(measured.way, Speculation::Off);
        let speed = measured.spread(|figures| figures.tokens_per_s);
        let ttft = measured.spread(|figures| figures.ttft_ms);
        let gain = plain.map(|plain| speed.median / plain.spread(|f| f.tokens_per_s).median);
        writeln!(
            out,
            "{:<8}{:<14}{:>8.0} {:>15} {:>8} {:>24} {:>8.2} {:>15} {:>24} {:>8.2} {:>9.2} {:>9.1}",
            label(measured.speculation),
            measured.way.name(),
            speed.median,
            format!("({:.0}-{:.0})", speed.min, speed.max),
            gain.map_or_else(|| "-".to_owned(), |gain| format!("{gain:.2}")),
            measured.difference(inside, |figures| figures.tokens_per_s),
            ttft.median,
            format!("({:.2}-{:.2})", ttft.min, ttft.max),
            measured.difference(inside, |figures| figures.ttft_ms),
            measured.spread(|figures| figures.outside_ms).median,
            measured.spread(|figures| figures.tokens_per_event).median,
            measured.spread(|figures| figures.cpu_us_per_token).median,
        )?;
    }
    Ok(())
}

impl Measured {
    fn spread(&self, figure: impl Fn(&Figures) -> f64) -> Spread {
        Spread::of(&self.rounds.iter().map(figure).collect::<Vec<_>>())
    }

    /// How much larger a figure is than the one of the load in this process.
    fn difference(&self, inside: &Self, figure: impl Fn(&Figures) -> f64) -> String {
        if self.way == Way::InProcess {
            return "-".to_owned();
        }
        let pairs = self.rounds.iter().zip(&inside.rounds);
        let percent = pairs.map(|(wire, inside)| 100.0 * (figure(wire) / figure(inside) - 1.0));
        let spread = Spread::of(&percent.collect::<Vec<_>>());
        format!("{:+.1} % ({:+.1} to {:+.1})", spread.median, spread.min, spread.max)
    }
}
