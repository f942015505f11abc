//! Owns the shapes in which the table's values are read: numbers, flags, spans, sets of labels.
//! Knows no names of metrics.

use prometheus::Histogram;
use slipstream_model::clock::Micros;
use slipstream_model::kernels::{Isa, NUMERICS_VERSION};

use super::metric::{Observed, Sample};
use super::reading::Reading;
use crate::engine::request::Priority;
use crate::engine::{FinishedBy, POSITIONS_MAX};
use crate::net::stats::{CloseReason, NetStats};
use crate::stage::Stage;

pub(super) fn count(value: u64) -> Option<f64> {
    Some(value as f64)
}

pub(super) fn flag(is_so: bool) -> Option<f64> {
    Some(f64::from(u8::from(is_so)))
}

pub(super) fn seconds(span: Micros) -> Option<f64> {
    Some(span.0 as f64 / 1e6)
}

/// A histogram without labels.
pub(super) fn only(histogram: &Histogram) -> Vec<Observed<'_>> {
    vec![(Vec::new(), histogram)]
}

/// Blocks that requests hold: neither free nor kept by the prefix cache alone.
pub(super) fn kv_used(r: &Reading<'_>) -> usize {
    r.engine.num_blocks - r.engine.num_free_blocks - r.engine.num_cached_blocks
}

pub(super) fn kv_usage(r: &Reading<'_>) -> Option<f64> {
    Some(kv_used(r) as f64 / r.engine.num_blocks.max(1) as f64)
}

pub(super) fn by_priority(r: &Reading<'_>) -> Vec<Sample> {
    let waiting = Priority::ALL.iter().zip(r.engine.waiting_by_priority);
    waiting.map(|(priority, num)| named(priority.name(), num as u64)).collect()
}

fn named(name: &str, value: u64) -> Sample {
    (vec![name.to_owned()], value as f64)
}

pub(super) fn finished_by(by: &FinishedBy) -> Vec<Sample> {
    vec![
        named("end_token", by.end_token),
        named("stop_string", by.stop_string),
        named("length", by.length),
        named("client_gone", by.client_gone),
        named("aborted", by.aborted),
        named("stalled", by.stalled),
        named("deadline", by.deadline),
        named("fault", by.fault),
        named("shutting_down", by.shutting_down),
    ]
}

/// The same in the words of other servers: an abort is an end that the client or its deadline
/// wanted, an error one that nobody wanted.
pub(super) fn finished_reason(by: &FinishedBy) -> Vec<Sample> {
    vec![
        named("stop", by.end_token + by.stop_string),
        named("length", by.length),
        named("abort", by.client_gone + by.aborted + by.stalled + by.deadline),
        named("error", by.fault + by.shutting_down),
    ]
}

/// Positions that no draft may reach are left out; what is deeper than the last one counts there.
pub(super) fn per_position(r: &Reading<'_>, counts: &[u64; POSITIONS_MAX]) -> Vec<Sample> {
    let shown = counts.iter().take(r.engine.draft_len_max).enumerate();
    shown.map(|(position, count)| named(&position.to_string(), *count)).collect()
}

/// Connections that are over: let go by the server for a reason, or else by their peer or an error.
pub(super) fn connections_closed(stats: &NetStats) -> Vec<Sample> {
    let let_go = CloseReason::ALL.map(|reason| (reason.name(), stats.let_go(reason).get()));
    let all = let_go.into_iter().chain([("peer", stats.left.get())]);
    all.map(|(name, count)| named(name, count)).collect()
}

pub(super) fn stages(r: &Reading<'_>) -> Vec<Sample> {
    let all = [Stage::Loading, Stage::Serving, Stage::Stuck, Stage::Draining];
    all.map(|stage| named(stage.name(), u64::from(r.stage == stage))).to_vec()
}

pub(super) fn build() -> Vec<Sample> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    vec![(vec![version, NUMERICS_VERSION.to_string(), Isa::detect().name().to_owned()], 1.0)]
}

pub(super) fn model(r: &Reading<'_>) -> Vec<Sample> {
    let served = r.metrics.served().into_iter();
    served.map(|served| (vec![served.model.clone(), served.fingerprint.clone()], 1.0)).collect()
}
