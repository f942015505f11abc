//! Owns the standard health service: it says of every name what the server's stage says. Knows no
//! requests.

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::grpc::methods::HEALTH_NAMES;
use crate::stage::Stage;

/// A health service that follows `stage`. Needs a running tokio runtime.
pub(crate) async fn following(stage: watch::Receiver<Stage>) -> HealthServer<HealthService> {
    let health = HealthReporter::new();
    // A new reporter says that the server serves, and knows no other name.
    for name in HEALTH_NAMES {
        health.set_service_status(name, ServingStatus::NotServing).await;
    }
    tokio::spawn(follow(stage, health.clone()));
    HealthServer::new(HealthService::from_health_reporter(health))
}

/// Watchers learn that the server goes, then their streams end: they must not hold up the end of
/// their connections.
async fn follow(mut stage: watch::Receiver<Stage>, mut health: HealthReporter) {
    loop {
        let now = *stage.borrow_and_update();
        let status = match now {
            Stage::Loading | Stage::Stuck | Stage::Draining => ServingStatus::NotServing,
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
