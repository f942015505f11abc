//! Owns the histograms and their buckets. A bucket is where an alert or a quantile can draw a line,
//! so they are dense where servers differ and end where nobody would wait. Knows no names.

use prometheus::{Histogram, HistogramOpts};

/// Arrival to first token, in seconds: from a tiny model on an idle machine to a long prompt behind
/// a full queue.
pub(crate) const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    10.0, 20.0, 40.0, 60.0,
];
/// Between tokens, in seconds: from the step of a tiny model to what a reader takes for a hang.
pub(crate) const TOKEN_SECONDS: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.5, 1.0, 2.0,
];
/// A step, in seconds: from that of a tiny model to the limit beyond which it hangs.
pub(crate) const STEP_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
/// A whole request or call, or its decoding, in seconds: from a refusal to the longest completion
/// that anybody waits for.
pub(crate) const REQUEST_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    60.0, 120.0, 300.0, 600.0,
];
/// Waiting for a place and computing the prompt, in seconds: next to nothing on an idle machine.
pub(crate) const QUEUE_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 20.0, 30.0, 60.0,
];
/// Tokens of one request: powers of two, from a single one to a long context.
pub(crate) const TOKENS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0, 32768.0,
];

/// An empty histogram with these buckets. It is named when it is shown.
pub(crate) fn histogram(buckets: &[f64]) -> Histogram {
    let options = HistogramOpts::new("observed", "named by the table").buckets(buckets.to_vec());
    Histogram::with_opts(options).expect("the buckets ascend")
}
