//! Owns what answers requests once the models are loaded, as every edge sees it. Immutable.

use std::sync::Arc;

use slipstream_model::clock::Clock;

use crate::grpc::served::ServedModel;
use crate::handle::EngineHandle;

/// What answers requests.
pub(crate) struct Backend {
    /// What requests are checked against.
    pub(crate) model: Arc<ServedModel>,
    /// Where requests go.
    pub(crate) engine: EngineHandle,
    /// The engine's clock.
    pub(crate) clock: Arc<dyn Clock>,
}
