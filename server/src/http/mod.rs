//! The HTTP edge: probes, version and metrics. Answers from what others count and say; asks nobody
//! and waits for nothing, so that it answers while everything else is busy. Knows no requests.

mod health;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{HeaderName, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde_json::{Value, json};
use slipstream_model::kernels::{Isa, NUMERICS_VERSION};

use crate::grpc::routes;
use crate::metrics::Metrics;
use crate::stage::Stage;
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
    /// What one step of the engine may take.
    pub(crate) step_limit: Duration,
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

/// Answers what no route of `router` does, whatever it said there before: gRPC calls in gRPC, all
/// else with the index.
pub(crate) fn with_fallback(router: Router, parts: HttpParts) -> Router {
    router.fallback(move |request: Request| {
        let path = request.uri().path().to_owned();
        let unknown_call = routes::unknown_call(&parts.metrics.calls, &request);
        let response = unknown_call.unwrap_or_else(|| {
            parts.metrics.http.answered(&path, StatusCode::NOT_FOUND);
            nothing_here()
        });
        async { response }
    })
}

fn nothing_here() -> Response {
    let text = format!(
        "there is nothing here; with --http-listen, HTTP and gRPC have a port each\n\n{INDEX}"
    );
    (StatusCode::NOT_FOUND, [(CONTENT_TYPE, PLAIN)], text).into_response()
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
    match Soundness::of(&parts.metrics, parts.step_limit) {
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
    if stage == Stage::Serving && Soundness::of(&parts.metrics, parts.step_limit).is_sound() {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use serde_json::Value;
    use slipstream_model::clock::{Clock, Micros};
    use tokio::sync::watch;
    use tower::ServiceExt;

    use super::{HttpParts, routes};
    use crate::metrics::{Metrics, ServedName};
    use crate::stage::{self, Stage};

    /// Time that stands where it was put.
    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> Micros {
            Micros(self.0.load(Ordering::Relaxed))
        }
    }

    fn server() -> (Arc<Hand>, watch::Sender<Stage>, Arc<Metrics>) {
        let hand = Arc::new(Hand::default());
        let clock: Arc<dyn Clock> = Arc::<Hand>::clone(&hand);
        let (stage, stages) = stage::channel();
        (hand, stage, Arc::new(Metrics::new(&clock, stages)))
    }

    fn served() -> ServedName {
        ServedName { model: "m \"x\"\n".to_owned(), fingerprint: "n1-0".to_owned() }
    }

    async fn get(metrics: &Arc<Metrics>, path: &str) -> (u16, Value) {
        let step_limit = Duration::from_secs(60);
        let parts = HttpParts { metrics: Arc::clone(metrics), step_limit };
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = routes(parts).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    #[tokio::test]
    async fn a_hung_engine_is_unhealthy_until_it_comes_back() {
        let (hand, stage, metrics) = server();
        let recorder = metrics.engine_starts(served());
        stage.send_replace(Stage::Serving);
        recorder.step_begins();
        hand.0.store(60_000_000, Ordering::Relaxed);
        assert_eq!(get(&metrics, "/health").await.0, 200);
        assert_eq!(get(&metrics, "/ready").await.0, 200);
        hand.0.store(61_500_000, Ordering::Relaxed);
        let (status, body) = get(&metrics, "/health").await;
        assert_eq!((status, &body["status"]), (503, &"unhealthy".into()));
        let reason = body["reason"].as_str().unwrap();
        assert!(reason.contains("61.5 s") && reason.contains("60s"), "{reason}");
        assert_eq!(get(&metrics, "/ready").await.0, 503);
        recorder.step_begins(); // so the one before has ended
        assert_eq!(get(&metrics, "/health").await.0, 200);
        assert_eq!(get(&metrics, "/ready").await.0, 200);
        assert!(metrics.text().contains("slipstream_engine_step_age_seconds 0\n"));
    }

    #[tokio::test]
    async fn an_engine_that_has_ended_is_unhealthy() {
        let (_, stage, metrics) = server();
        stage.send_replace(Stage::Serving);
        let recorder = metrics.engine_starts(served());
        assert_eq!(get(&metrics, "/health").await.0, 200);
        drop(recorder);
        let (status, body) = get(&metrics, "/health").await;
        assert_eq!((status, &body["reason"]), (503, &"the engine has ended".into()));
        assert_eq!(get(&metrics, "/ready").await.0, 503);
    }

    #[tokio::test]
    async fn only_serving_is_ready_and_every_stage_is_alive() {
        let (_, stage, metrics) = server();
        let recorder = metrics.engine_starts(served());
        for (now, name, ready) in [
            (Stage::Loading, "loading", 503),
            (Stage::Serving, "serving", 200),
            (Stage::Draining, "draining", 503),
        ] {
            stage.send_replace(now);
            let (status, body) = get(&metrics, "/ready").await;
            assert_eq!((status, &body["stage"]), (ready, &name.into()));
            let (status, body) = get(&metrics, "/health").await;
            assert_eq!((status, &body["stage"]), (200, &name.into()));
        }
        drop(recorder);
    }

    #[test]
    fn a_model_name_cannot_break_the_format() {
        let (_, _, metrics) = server();
        let recorder = metrics.engine_starts(served());
        assert!(metrics.text().contains(r#"model_name="m \"x\"\n""#));
        assert!(metrics.de_facto_text().lines().all(|line| line.starts_with(['#', 'v', 'p'])));
        drop(recorder);
    }
}
