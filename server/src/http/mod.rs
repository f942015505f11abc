//! The HTTP edge: probes, version and metrics. Answers from what others count and say; asks nobody
//! and waits for nothing, so that it answers while everything else is busy. Knows no requests.

mod health;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{HeaderName, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde_json::{Value, json};
use slipstream_model::kernels::{Isa, NUMERICS_VERSION};

use crate::metrics::Metrics;
use health::Soundness;

/// Prometheus's text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Anything else that is text.
const PLAIN: &str = "text/plain; charset=utf-8";
/// When a client that is told "not yet" may ask again, in seconds.
const RETRY_AFTER: &str = "1";

/// What is on this port, for somebody who opens it in a browser.
const INDEX: &str = "\
slipstream: a speculative-decoding server

gRPC   slipstream.v1 (Completions, Tokenization, Models), health, reflection
HTTP   /health        whether the process is sound
       /ready         whether requests are taken
       /version       what runs and which model it serves
       /metrics       Prometheus text format
       /metrics/vllm  the same values under names that dashboards know
";

/// What the routes answer from.
#[derive(Clone)]
pub(crate) struct HttpParts {
    /// Everything that is counted, the stage included.
    pub(crate) metrics: Arc<Metrics>,
}

/// The routes of plain HTTP. GET and HEAD only; queries are not looked at.
pub(crate) fn routes(parts: HttpParts) -> Router {
    Router::new()
        .route("/", get(|| async { ([(CONTENT_TYPE, PLAIN)], INDEX) }))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .route("/metrics/vllm", get(de_facto_metrics))
        .route_layer(middleware::from_fn_with_state(parts.clone(), count))
        .with_state(parts)
}

/// Counts what was answered.
async fn count(State(parts): State<HttpParts>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    parts.metrics.http.answered(&path, response.status());
    response
}

/// Liveness: in any stage, as long as the process is sound.
async fn health(State(parts): State<HttpParts>) -> Response {
    let stage = parts.metrics.stage().name();
    match Soundness::of(&parts.metrics) {
        Soundness::Sound => Json(json!({ "status": "ok", "stage": stage })).into_response(),
        Soundness::Unsound(reason) => {
            let body = json!({ "status": "unhealthy", "stage": stage, "reason": reason });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

/// Readiness: requests sent now are taken. How the draft fares has no say in it.
async fn ready(State(parts): State<HttpParts>) -> Response {
    let stage = parts.metrics.stage();
    if stage == crate::stage::Stage::Serving && Soundness::of(&parts.metrics).is_sound() {
        return Json(json!({ "status": "ready", "stage": stage.name() })).into_response();
    }
    let body = Json(json!({ "status": "not ready", "stage": stage.name() }));
    let retry = [(HeaderName::from_static("retry-after"), HeaderValue::from_static(RETRY_AFTER))];
    (StatusCode::SERVICE_UNAVAILABLE, retry, body).into_response()
}

async fn version(State(parts): State<HttpParts>) -> Json<Value> {
    let served = parts.metrics.served();
    Json(json!({
        "name": "slipstream",
        "version": env!("CARGO_PKG_VERSION"),
        "numerics_version": NUMERICS_VERSION,
        "isa": Isa::detect().name(),
        "model": served.map(|served| &served.model),
        "fingerprint": served.map(|served| &served.fingerprint),
    }))
}

async fn metrics(State(parts): State<HttpParts>) -> Response {
    ([(CONTENT_TYPE, TEXT_FORMAT)], parts.metrics.text()).into_response()
}

async fn de_facto_metrics(State(parts): State<HttpParts>) -> Response {
    ([(CONTENT_TYPE, TEXT_FORMAT)], parts.metrics.de_facto_text()).into_response()
}
