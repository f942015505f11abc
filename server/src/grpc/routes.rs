//! Owns the gRPC services of the port: which there are, their message limits, and health. Knows no
//! connections.

use std::sync::{Arc, OnceLock};

use slipstream_proto::v1::completions_server::CompletionsServer;
use tokio::sync::watch;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::backend::Backend;
use crate::grpc::calls::Calls;
use crate::grpc::service::CompletionsService;
use crate::stage::Stage;

/// Names that health is reported under: the whole server and its one service.
const HEALTH_NAMES: [&str; 2] = ["", <CompletionsServer<CompletionsService> as NamedService>::NAME];

/// What the services need.
pub(crate) struct GrpcParts {
    /// What answers requests, once it is loaded.
    pub(crate) backend: Arc<OnceLock<Backend>>,
    /// Where calls are counted.
    pub(crate) calls: Calls,
    /// Where the server's life stands.
    pub(crate) stage: watch::Receiver<Stage>,
    /// One request message.
    pub(crate) message_bytes_max: usize,
}

/// All gRPC services.
pub(crate) fn routes(parts: GrpcParts) -> axum::Router {
    let GrpcParts { backend, calls, stage, message_bytes_max } = parts;
    let health = HealthReporter::new();
    let completions = CompletionsServer::new(CompletionsService::new(backend, calls))
        .max_decoding_message_size(message_bytes_max);
    tokio::spawn(follow(stage, health.clone()));
    Routes::new(HealthServer::new(HealthService::from_health_reporter(health)))
        .add_service(completions)
        .into_axum_router()
}

/// Health says what the stage says. Watchers learn that the server goes, then their streams end:
/// they must not hold up the end of their connections.
async fn follow(mut stage: watch::Receiver<Stage>, mut health: HealthReporter) {
    loop {
        let now = *stage.borrow_and_update();
        let status = match now {
            Stage::Loading | Stage::Draining => ServingStatus::NotServing,
            Stage::Serving => ServingStatus::Serving,
        };
        for name in HEALTH_NAMES {
            health.set_service_status(name, status).await;
            if now == Stage::Draining {
                health.clear_service_status(name).await;
                health.set_service_status(name, status).await;
            }
        }
        if stage.changed().await.is_err() {
            return;
        }
    }
}
