//! Owns everything that is read at one scrape, so that all metrics of it show the same moment.

use super::Metrics;
use super::process::ProcessReading;
use crate::engine::EngineSnapshot;
use crate::stage::Stage;

/// One scrape's view.
pub(crate) struct Reading<'a> {
    pub(super) metrics: &'a Metrics,
    pub(super) engine: EngineSnapshot,
    pub(super) process: ProcessReading,
    pub(super) stage: Stage,
}

impl<'a> Reading<'a> {
    /// Reads everything once.
    pub(super) fn take(metrics: &'a Metrics) -> Self {
        Self {
            metrics,
            engine: metrics.engine.snapshot(),
            process: ProcessReading::take(),
            stage: metrics.stage(),
        }
    }
}
