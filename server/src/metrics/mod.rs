//! Everything that `/metrics` shows. `names.rs` is the one table of it; whoever counts something
//! holds one of the small structs here and adds to it without waiting for a reader; a scrape reads
//! them all once. Knows what is counted, not how it comes about.

mod buckets;
pub(crate) mod calls;
pub(crate) mod engine;
mod exposition;
pub(crate) mod http;
pub mod metric;
pub mod names;
pub(crate) mod process;
mod reading;
pub mod reference;
pub(crate) mod tally;
mod values;

use std::sync::{Arc, OnceLock};

use slipstream_model::clock::{Clock, Micros};
use tokio::sync::watch;

use self::calls::CallCounters;
use self::engine::{EngineMetrics, EngineRecorder};
use self::http::HttpCounters;
use crate::net::stats::NetStats;
use crate::stage::Stage;

/// The model that is served, as metrics and probes name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServedName {
    /// The name clients may ask for.
    pub(crate) model: String,
    /// What output depends on.
    pub(crate) fingerprint: String,
}

/// Everything that is counted. One per server.
pub(crate) struct Metrics {
    stage: watch::Receiver<Stage>,
    started_unix_seconds: f64,
    served: OnceLock<ServedName>,
    engine: Arc<EngineMetrics>,
    /// For the connection layer.
    pub(crate) net: Arc<NetStats>,
    /// For the gRPC edge.
    pub(crate) calls: Arc<CallCounters>,
    /// For the HTTP edge.
    pub(crate) http: HttpCounters,
}

impl Metrics {
    /// Of a server that just starts; `clock` is the engine's.
    pub(crate) fn new(clock: &Arc<dyn Clock>, stage: watch::Receiver<Stage>) -> Self {
        Self {
            stage,
            started_unix_seconds: process::unix_seconds(),
            served: OnceLock::new(),
            engine: Arc::new(EngineMetrics::new(Arc::clone(clock))),
            net: Arc::default(),
            calls: Arc::new(CallCounters::new(Arc::clone(clock))),
            http: HttpCounters::default(),
        }
    }

    /// The engine thread is about to start with this model. Returns its side of the metrics.
    pub(crate) fn engine_starts(&self, served: ServedName) -> EngineRecorder {
        // There is one start per server.
        let _ = self.served.set(served);
        EngineRecorder::new(Arc::clone(&self.engine))
    }

    /// Where the server stands.
    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// The model, once it is loaded.
    pub(crate) fn served(&self) -> Option<&ServedName> {
        self.served.get()
    }

    /// How long the engine has been inside one step; zero between two steps.
    pub(crate) fn step_age(&self) -> Micros {
        self.engine.step_age()
    }

    /// Whether the engine thread ran and has ended.
    pub(crate) fn has_engine_ended(&self) -> bool {
        self.engine.has_ended()
    }

    /// All metrics in Prometheus's text format.
    pub(crate) fn text(&self) -> String {
        exposition::own(self)
    }

    /// Those with de-facto names, under these.
    pub(crate) fn de_facto_text(&self) -> String {
        exposition::de_facto(self)
    }
}
