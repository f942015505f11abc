//! Owns how gRPC calls find their services: one router of all of them, with what surrounds every
//! call. Knows no connections; those serve the router.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::middleware::from_fn_with_state;
use slipstream_proto::v1::completions_server::CompletionsServer;
use slipstream_proto::v1::models_server::ModelsServer;
use slipstream_proto::v1::tokenization_server::TokenizationServer;
use tokio::sync::watch;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic_reflection::server::Builder;

use crate::backend::Backend;
use crate::config::EdgeConfig;
use crate::grpc::around::{Surroundings, around};
use crate::grpc::calls::Calls;
use crate::grpc::health;
use crate::grpc::live_calls::LiveCalls;
use crate::grpc::models::ModelsService;
use crate::grpc::offload::Offload;
use crate::grpc::service::CompletionsService;
use crate::grpc::shared::Shared;
use crate::grpc::tokenization::TokenizationService;
use crate::metrics::calls::CallCounters;
use crate::stage::Stage;

pub(crate) use crate::grpc::around::unknown_call;

/// What the services are made of.
pub(crate) struct GrpcParts {
    /// What answers requests, once it is loaded.
    pub(crate) backend: Arc<OnceLock<Backend>>,
    /// Where calls in progress are counted.
    pub(crate) calls: Calls,
    /// Bounds and policy.
    pub(crate) edge: EdgeConfig,
    /// Where the server stands.
    pub(crate) stage: watch::Receiver<Stage>,
    /// Where calls are recorded.
    pub(crate) counters: Arc<CallCounters>,
}

/// Every service on its path. Needs a running tokio runtime for the sweeper of stalled calls, which
/// ends with the last clone of the router, and for health, which ends with the stage. Paths that
/// are none of these are for the caller's fallback: [`unknown_call`].
pub(crate) async fn routes(parts: GrpcParts) -> Router {
    let GrpcParts { backend, calls, edge, stage, counters } = parts;
    let health = health::following(stage.clone()).await;
    let live = LiveCalls::start(edge.stall_limit);
    let shared = Shared { backend, calls, live, offload: Offload::new(), stage };
    let limit = edge.message_bytes_max;
    // The generated servers have no trait in common for their settings.
    let mut completions = CompletionsServer::new(CompletionsService::new(shared.clone()))
        .max_decoding_message_size(limit);
    let mut models =
        ModelsServer::new(ModelsService::new(shared.clone())).max_decoding_message_size(limit);
    let mut tokenization =
        TokenizationServer::new(TokenizationService::new(shared)).max_decoding_message_size(limit);
    if edge.gzip {
        let gzip = CompressionEncoding::Gzip;
        completions = completions.accept_compressed(gzip).send_compressed(gzip);
        models = models.accept_compressed(gzip).send_compressed(gzip);
        tokenization = tokenization.accept_compressed(gzip).send_compressed(gzip);
    }
    let surroundings = Surroundings { counters, message_bytes_max: limit };
    Routes::from(Router::new())
        .add_service(completions)
        .add_service(models)
        .add_service(tokenization)
        .add_service(health)
        .add_service(reflection().build_v1().expect(DESCRIPTORS))
        .add_service(reflection().build_v1alpha().expect(DESCRIPTORS))
        .into_axum_router()
        .layer(from_fn_with_state(surroundings, around))
}

/// Why reflection cannot fail to be built.
const DESCRIPTORS: &str = "the descriptor sets are made at build time and are well-formed";

/// Reflection over everything that is served, itself in both versions included.
fn reflection() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(slipstream_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
        .include_reflection_service(false)
}
