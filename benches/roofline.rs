//! Owns what this machine could do at best: how fast it reads memory, and how fast the
//! multiply-adds of the products run on registers. Measured anew by every bench that compares with
//! it, because machines drift. Knows no models.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use anyhow::Context;
use slipstream_model::kernels::Isa;
use slipstream_model::kernels::memory::filled;
use slipstream_model::kernels::peak::{Mix, multiply_adds};
use slipstream_model::kernels::team::Team;

use crate::stats::Spread;

/// Bytes read per measurement: far more than any cache holds.
const BUFFER_BYTES: usize = 1 << 30;
/// Bytes read in a row.
const CHUNK_BYTES: usize = 1 << 20;
/// Numbers summed side by side, each into a sum of its own.
const LANES: usize = 32;
/// Measurements of memory, after one to warm up; the median counts.
const MEMORY_ROUNDS: usize = 5;
/// Measurements of arithmetic; the best counts, because nothing can make it faster than it is.
const PEAK_ROUNDS: usize = 7;
/// Multiply-adds per thread and measurement: some milliseconds.
const PEAK_MACS: u64 = 1 << 29;

/// All mixes with their names.
pub const MIXES: [(Mix, &str); 3] =
    [(Mix::Q8_0, "Q8_0"), (Mix::Q4_0, "4-bit"), (Mix::Floats, "floats")];

/// What one implementation of the kernels could do.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// The implementation.
    pub isa: Isa,
    /// Thousand million multiply-adds per second and mix, all threads together, as [`MIXES`].
    pub gmacs: [f64; 3],
}

/// What this machine could do.
#[derive(Clone, Debug)]
pub struct Roofline {
    /// Threads.
    pub threads: usize,
    /// Memory read by one thread, thousand million bytes per second.
    pub alone_gb_per_s: Spread,
    /// The same by all threads.
    pub gb_per_s: Spread,
    /// Every implementation but the plain one.
    pub peaks: Vec<Peak>,
}

impl Roofline {
    /// Measures it: some seconds, and a GiB of memory meanwhile.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn measure(threads: usize) -> anyhow::Result<Self> {
        let (mut alone, mut team) = (Team::new(1)?, Team::new(threads)?);
        // In huge pages where there are some, as weights are.
        let buffer = filled(BUFFER_BYTES / size_of::<u64>(), 1_u64).context("no memory to read")?;
        let (mut alone_times, mut times) = (Vec::new(), Vec::new());
        for round in 0..=MEMORY_ROUNDS {
            let speeds = [gb_per_s(&mut alone, &buffer), gb_per_s(&mut team, &buffer)];
            if round > 0 {
                alone_times.push(speeds[0]);
                times.push(speeds[1]);
            }
        }
        drop(buffer);
        let mut peaks = Vec::new();
        for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Plain) {
            let gmacs = MIXES.map(|(mix, _)| peak(&mut team, isa, mix));
            peaks.push(Peak { isa, gmacs });
        }
        let (alone_gb_per_s, gb_per_s) = (Spread::of(&alone_times), Spread::of(&times));
        Ok(Self { threads, alone_gb_per_s, gb_per_s, peaks })
    }

    /// Least milliseconds to read so many bytes.
    #[must_use]
    pub fn read_ms(&self, num_bytes: f64) -> f64 {
        num_bytes / self.gb_per_s.median / 1e6
    }

    /// Least milliseconds for so many multiply-adds.
    ///
    /// # Errors
    /// When the implementation has no measured peak.
    pub fn macs_ms(&self, isa: Isa, mix: Mix, macs: f64) -> anyhow::Result<f64> {
        let peak = self.peaks.iter().find(|peak| peak.isa == isa);
        let peak = peak.with_context(|| format!("{} has no measured peak", isa.name()))?;
        let index = MIXES.iter().position(|(other, _)| *other == mix).context("a known mix")?;
        Ok(macs / peak.gmacs[index] / 1e6)
    }
}

impl fmt::Display for Roofline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (isa, threads) = (Isa::detect().name(), self.threads);
        writeln!(f, "kernels chosen here: {isa}, {threads} threads")?;
        for (threads, speed) in [(1, &self.alone_gb_per_s), (self.threads, &self.gb_per_s)] {
            let Spread { min, median, max } = *speed;
            let label = format!("memory read, {threads} threads");
            writeln!(f, "{label:<30}{median:>7.1} GB/s   ({min:.1}-{max:.1})")?;
        }
        for Peak { isa, gmacs } in &self.peaks {
            for ((_, name), gmacs) in MIXES.iter().zip(gmacs) {
                let label = format!("peak {}, {name}", isa.name());
                writeln!(f, "{label:<30}{gmacs:>7.1} GMAC/s, {threads} threads")?;
            }
        }
        Ok(())
    }
}

/// Reads the buffer once.
fn gb_per_s(team: &mut Team, buffer: &[u64]) -> f64 {
    let chunk_len = CHUNK_BYTES / size_of::<u64>();
    let start = Instant::now();
    team.run(buffer.len() / chunk_len, &|chunk| {
        black_box(sum(&buffer[chunk * chunk_len..][..chunk_len]));
    });
    size_of_val(buffer) as f64 / start.elapsed().as_nanos() as f64
}

/// The sum in many lanes, which the compiler turns into vectors.
fn sum(numbers: &[u64]) -> [u64; LANES] {
    let mut sums = [0; LANES];
    for part in numbers.as_chunks::<LANES>().0 {
        for (sum, number) in sums.iter_mut().zip(part) {
            *sum ^= number;
        }
    }
    sums
}

/// Multiply-adds per nanosecond of all threads together.
fn peak(team: &mut Team, isa: Isa, mix: Mix) -> f64 {
    let threads = team.num_threads();
    let mut best = 0.0_f64;
    for _ in 0..PEAK_ROUNDS {
        let start = Instant::now();
        // Small parts, so that the threads finish together.
        let num_parts = 16 * threads as u64;
        let macs = threads as u64 * PEAK_MACS;
        team.run(num_parts as usize, &|_| {
            black_box(multiply_adds(isa, mix, macs / num_parts));
        });
        best = best.max(macs as f64 / start.elapsed().as_nanos() as f64);
    }
    best
}
