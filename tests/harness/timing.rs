//! Owns what a test says about its own cost. Knows no test.

use std::io::Write;
use std::time::Instant;

/// Writes a line to the terminal whatever the test runner captures, for figures worth seeing.
pub fn report(line: &str) {
    // One write, so that lines of other threads cannot fall between text and line end. A closed
    // terminal is no reason to fail a test.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Runs a test's body and reports how long it took beside its budget. A slow machine does not fail
/// a test: the budget is there to be looked at.
pub fn timed<T>(name: &str, budget_s: f64, body: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = body();
    let elapsed_s = start.elapsed().as_secs_f64();
    let verdict = if elapsed_s > budget_s { " OVER BUDGET" } else { "" };
    report(&format!("  {name}: {elapsed_s:.2} s of {budget_s} s{verdict}"));
    result
}
