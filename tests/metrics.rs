//! Proves that what is shown over HTTP is what happened: every metric of the table and no other,
//! in the format that Prometheus reads, equal to what clients saw, never falling, balanced at rest;
//! and that probes follow the life of the server.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::FinishReason;
use slipstream_proto::v1::generate_event::Event;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::local::LocalServer;
use slipstream_server::metrics::metric::{Kind, Unit};
use slipstream_server::metrics::names::METRICS;
use slipstream_server::metrics::reference;
use slipstream_tests::client::{
    Client, block_on, client, config, greedy, sampled, speculation, start, stream,
};
use slipstream_tests::exposition::Page;
use slipstream_tests::held_loading::HeldLoading;
use slipstream_tests::plain_http::{get, request};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::Code;
use tonic::codegen::Service;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const PROMPT: &str = "use std::collections::HashMap;\n";
/// Far longer than anything here takes: only a server that hangs reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Writes the page of documentation anew.
const WRITE_VARIABLE: &str = "SLIPSTREAM_WRITE_DOCS";

async fn page(server: &LocalServer, path: &str) -> Page {
    let answer = get(server.address(), path).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let content_type = answer.header("content-type").unwrap();
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    Page::parse(&answer.body).unwrap()
}

/// The page once the engine has taken `num` requests and nothing of them is left.
async fn page_at_rest(server: &LocalServer, num: f64) -> Page {
    let begun = Instant::now();
    loop {
        let page = page(server, "/metrics").await;
        let released = page.number("slipstream_requests_released_total");
        if released == num && page.number("slipstream_requests_submitted_total") == num {
            return page;
        }
        assert!(begun.elapsed() < PATIENCE, "{released} of {num} released");
        tokio::task::yield_now().await;
    }
}

#[test]
fn the_table_keeps_its_rules() {
    let mut names = BTreeSet::new();
    for metric in METRICS {
        let name = metric.name;
        assert!(names.insert(name), "{name} is there twice");
        let suffix = name.strip_prefix("slipstream_").expect(name);
        let is_lower = |c: char| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit();
        assert!(name.chars().all(is_lower), "{name}");
        assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
        assert_eq!(name.ends_with("_seconds"), metric.unit == Unit::Seconds, "{name}");
        assert_eq!(name.ends_with("_bytes"), metric.unit == Unit::Bytes, "{name}");
        assert_eq!(name.ends_with("_info"), metric.help.ends_with("always 1."), "{name}");
        for part in ["_count", "_sum", "_bucket"] {
            assert!(!name.ends_with(part), "{name} looks like part of a histogram");
        }
        assert!(metric.help.ends_with('.') && !metric.help.contains(['|', '\n']), "{name}");
        assert!(!metric.labels.contains(&"le"), "{name}");
        if let Some(also) = metric.de_facto {
            assert_eq!(also.strip_prefix("vllm:").unwrap_or(also), suffix, "{name}");
        }
    }
}

#[test]
fn the_documentation_is_made_from_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path: PathBuf = root.join("docs/metrics.md");
    let wanted = reference::markdown();
    if std::env::var_os(WRITE_VARIABLE).is_some() {
        fs::write(&path, &wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == wanted, "docs/metrics.md is old: run with {WRITE_VARIABLE}=1");
}

#[test]
fn the_reader_of_pages_sees_what_is_wrong() {
    let head = "# HELP a_x Text.\n# TYPE a_x histogram\n";
    let good = "a_x_bucket{le=\"1\"} 1\na_x_bucket{le=\"+Inf\"} 2\na_x_sum 3\na_x_count 2\n";
    Page::parse(&format!("{head}{good}")).unwrap();
    for (part, odd) in [
        ("le=\"1\"} 1", "le=\"1\"} 3"),
        ("a_x_count 2", "a_x_count 1"),
        ("a_x_sum 3\n", ""),
        ("a_x_sum", "b_x_sum"),
        ("+Inf", "0.5"),
        ("{le=\"1\"}", "{le=\"1}"),
        ("{le=\"1\"} 1", "{le=\"1\"} one"),
        ("a_x_count 2\n", "a_x_count 2"),
        (good, ""),
    ] {
        let text = format!("{head}{good}").replace(part, odd);
        assert!(Page::parse(&text).is_err(), "{text}");
    }
    for text in
        ["a 1\n", "# TYPE a gauge\n", "# HELP a A.\na 1\n", "# HELP a A.\n# TYPE a x\na 1\n"]
    {
        assert!(Page::parse(text).is_err(), "{text}");
    }
}

/// What clients received, added up.
#[derive(Debug, Default)]
struct Seen {
    num: f64,
    prompt_tokens: f64,
    output_tokens: f64,
    with_tokens: f64,
    gaps: f64,
    with_many: f64,
    drafts: f64,
    proposed: BTreeMap<usize, f64>,
    accepted: BTreeMap<usize, f64>,
    reasons: BTreeMap<i32, f64>,
    seconds: BTreeMap<&'static str, f64>,
}

impl Seen {
    fn add_end(&mut self, finished: &v1::Finished) {
        self.num += 1.0;
        *self.reasons.entry(finished.reason).or_default() += 1.0;
        let usage = finished.usage.unwrap();
        self.prompt_tokens += f64::from(usage.prompt_tokens);
        self.output_tokens += f64::from(usage.output_tokens);
        let timings = finished.timings.unwrap();
        let mut span = |name, ms: f64| *self.seconds.entry(name).or_default() += ms / 1000.0;
        let first = timings.first_token_ms.unwrap();
        span("e2e_request_latency", timings.total_ms);
        span("request_queue_time", timings.queue_ms.unwrap());
        span("request_prefill_time", first - timings.queue_ms.unwrap());
        span("request_decode_time", timings.total_ms - first);
        if usage.output_tokens > 1 {
            self.with_many += 1.0;
            let per_token = (timings.total_ms - first) / f64::from(usage.output_tokens - 1);
            span("request_time_per_output_token", per_token);
        }
        let stats = finished.speculation.clone().unwrap_or_default();
        self.drafts += stats.proposed_by_position.first().copied().map_or(0.0, f64::from);
        let add = |into: &mut BTreeMap<usize, f64>, counts: &[u32]| {
            for (position, &count) in counts.iter().enumerate() {
                *into.entry(position).or_default() += f64::from(count);
            }
        };
        add(&mut self.proposed, &stats.proposed_by_position);
        add(&mut self.accepted, &stats.accepted_by_position);
    }
}

/// Streams one completion to its end. Returns its ids and text.
async fn watch(
    client: &Client,
    request: v1::GenerateRequest,
    seen: &mut Seen,
) -> (Vec<u32>, String) {
    let mut events = client.clone().generate(request).await.unwrap().into_inner();
    let (mut ids, mut text) = (Vec::new(), String::new());
    let mut num_events = 0.0;
    while let Some(event) = events.message().await.unwrap() {
        match event.event.unwrap() {
            Event::Started(_) => {}
            Event::Tokens(tokens) => {
                ids.extend(tokens.tokens.iter().map(|token| token.id));
                text.push_str(&tokens.text);
                num_events += f64::from(u8::from(!tokens.tokens.is_empty()));
            }
            Event::Finished(finished) => seen.add_end(&finished),
        }
    }
    if num_events > 0.0 {
        seen.with_tokens += 1.0;
        seen.gaps += num_events - 1.0;
    }
    (ids, text)
}

/// A bit of everything that ends by the rules of decoding.
async fn known_load(client: &Client) -> Seen {
    let mut seen = Seen::default();
    let fixed = |len| speculation(Mode::Fixed, Some(len));
    let (ids, text) = watch(client, greedy(PROMPT, 40), &mut seen).await;
    for len in [1, 4, 8] {
        let request = v1::GenerateRequest { speculation: fixed(len), ..greedy(PROMPT, 60) };
        watch(client, request, &mut seen).await;
    }
    let off = speculation(Mode::Off, None);
    let plain = v1::GenerateRequest { speculation: off, ..sampled(PROMPT, 30, 7) };
    watch(client, plain, &mut seen).await;
    watch(client, greedy("fn main() {", 1), &mut seen).await;
    let ended = v1::GenerateRequest { stop_token_ids: vec![ids[20]], ..greedy(PROMPT, 40) };
    watch(client, ended, &mut seen).await;
    let stop: String = text.chars().skip(30).take(3).collect();
    let stopped = v1::GenerateRequest { stop_strings: vec![stop], ..greedy(PROMPT, 40) };
    watch(client, stopped, &mut seen).await;
    seen
}

fn close(found: f64, wanted: f64, what: &str) {
    assert!((found - wanted).abs() <= 1e-9 * wanted.abs().max(1.0), "{what}: {found}, {wanted}");
}

fn compare(page: &Page, seen: &Seen) {
    let number = |name: &str| page.number(&format!("slipstream_{name}"));
    assert_eq!(number("prompt_tokens_total"), seen.prompt_tokens);
    assert_eq!(number("generation_tokens_total"), seen.output_tokens);
    assert!(number("committed_tokens_total") > seen.output_tokens, "a stop string takes back");
    assert_eq!(number("spec_decode_num_drafts_total"), seen.drafts);
    assert_eq!(number("spec_decode_num_draft_tokens_total"), seen.proposed.values().sum::<f64>());
    assert_eq!(
        number("spec_decode_num_accepted_tokens_total"),
        seen.accepted.values().sum::<f64>()
    );
    for (what, counts) in [("draft", &seen.proposed), ("accepted", &seen.accepted)] {
        let name = format!("slipstream_spec_decode_num_{what}_tokens_per_pos_total");
        for position in 0..8 {
            let found = page.value(&name, &[("position", &position.to_string())]).unwrap();
            assert_eq!(found, counts.get(&position).copied().unwrap_or(0.0), "{name} {position}");
        }
    }
    let finished = |reason| page.value("slipstream_requests_finished_total", &[("reason", reason)]);
    for (wire, reason) in [
        (FinishReason::EndToken, "end_token"),
        (FinishReason::StopString, "stop_string"),
        (FinishReason::Length, "length"),
    ] {
        assert!(seen.reasons[&wire.into()] > 0.0, "the load has none that ends by {reason}");
        assert_eq!(finished(reason), Some(seen.reasons[&wire.into()]), "{reason}");
    }
    for (name, num) in [
        ("time_to_first_token_seconds", seen.with_tokens),
        ("inter_token_latency_seconds", seen.gaps),
        ("request_time_per_output_token_seconds", seen.with_many),
        ("e2e_request_latency_seconds", seen.num),
        ("request_prompt_tokens", seen.num),
        ("request_generation_tokens", seen.num),
        ("step_time_seconds", number("steps_total")),
    ] {
        assert_eq!(number(&format!("{name}_count")), num, "{name}");
    }
    for (name, seconds) in &seen.seconds {
        close(number(&format!("{name}_seconds_sum")), *seconds, name);
    }
    assert_eq!(number("request_prompt_tokens_sum"), seen.prompt_tokens);
    assert_eq!(number("request_generation_tokens_sum"), seen.output_tokens);
}

fn is_at_rest(page: &Page) {
    for name in ["requests_live", "num_requests_running", "num_requests_waiting", "kv_blocks_used"]
    {
        assert_eq!(page.number(&format!("slipstream_{name}")), 0.0, "{name}");
    }
    let blocks = page.number("slipstream_kv_blocks");
    assert!(blocks > 0.0);
    let kept = page.number("slipstream_kv_blocks_cached");
    assert_eq!(page.number("slipstream_kv_blocks_free") + kept, blocks);
    assert_eq!(page.number("slipstream_kv_cache_usage_perc"), 0.0);
    assert_eq!(page.number("slipstream_num_requests_paused"), 0.0);
    assert_eq!(page.number("slipstream_engine_step_age_seconds"), 0.0);
}

#[test]
fn what_is_shown_is_what_clients_saw() {
    block_on(async {
        let server = start(|_| {}).await;
        let seen = known_load(&client(&server)).await;
        let page = page_at_rest(&server, seen.num).await;
        compare(&page, &seen);
        is_at_rest(&page);
        server.stop().await.unwrap();
    });
}

#[test]
fn the_table_is_what_is_shown() {
    block_on(async {
        let server = start(|_| {}).await;
        let seen = known_load(&client(&server)).await;
        page_at_rest(&server, seen.num).await;
        let own = page(&server, "/metrics").await;
        let wanted: BTreeSet<&str> = METRICS.iter().map(|metric| metric.name).collect();
        let found: BTreeSet<&str> = own.families.keys().map(String::as_str).collect();
        assert_eq!(found, wanted);
        for metric in METRICS {
            let family = &own.families[metric.name];
            assert_eq!(
                (family.kind.as_str(), family.help.as_str()),
                (metric.kind.name(), metric.help)
            );
            for sample in &family.samples {
                let labels = sample.labels.keys().map(String::as_str).filter(|name| *name != "le");
                let wanted: BTreeSet<&str> = metric.labels.iter().copied().collect();
                assert_eq!(labels.collect::<BTreeSet<_>>(), wanted, "{}", sample.name);
                let is_share = matches!(metric.unit, Unit::Share | Unit::Flag);
                assert!(!is_share || (0.0..=1.0).contains(&sample.value), "{sample:?}");
            }
        }
        let others = page(&server, "/metrics/vllm").await;
        let also: BTreeSet<&str> = METRICS.iter().filter_map(|metric| metric.de_facto).collect();
        assert_eq!(others.families.keys().map(String::as_str).collect::<BTreeSet<_>>(), also);
        let info = &own.families["slipstream_model_info"].samples[0].labels;
        for family in others.families.values() {
            for sample in &family.samples {
                let model = sample.labels.get("model_name");
                let is_theirs = sample.name.starts_with("vllm:");
                assert_eq!(model, is_theirs.then_some(&info["model_name"]), "{sample:?}");
            }
        }
        let name = [("model_name", info["model_name"].as_str())];
        let theirs = others.value("vllm:generation_tokens_total", &name).unwrap();
        assert_eq!(theirs, own.number("slipstream_generation_tokens_total"));
        server.stop().await.unwrap();
    });
}

#[test]
fn forced_ends_are_counted_and_leave_nothing() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let mut num = 0.0;
        for seed in 0..6 {
            let mut events =
                client.clone().generate(sampled(PROMPT, 900, seed)).await.unwrap().into_inner();
            events.message().await.unwrap().expect("Started");
            events.message().await.unwrap().expect("tokens");
            num += 1.0;
        }
        let mut late = tonic::Request::new(greedy(PROMPT, 900));
        late.set_timeout(Duration::from_millis(30));
        let status = client.clone().complete(late).await.expect_err("900 tokens take longer");
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
        num += 1.0;
        let page = page_at_rest(&server, num).await;
        is_at_rest(&page);
        let finished =
            |reason| page.value("slipstream_requests_finished_total", &[("reason", reason)]);
        // The client's own clock may be the first to see that the time is over.
        assert_eq!(finished("client_gone").unwrap() + finished("deadline").unwrap(), num);
        assert!(finished("client_gone").unwrap() >= 6.0);
        let aborted = [("finished_reason", "abort")];
        assert_eq!(page.value("slipstream_request_success_total", &aborted), Some(num));
        server.stop().await.unwrap();
    });
}

#[test]
fn nothing_falls_while_it_is_busy() {
    block_on(async {
        let server = start(|_| {}).await;
        let mut streams = JoinSet::new();
        for seed in 0..8 {
            let client = client(&server);
            streams.spawn(async move { stream(&client, sampled(PROMPT, 200, seed)).await });
        }
        let mut last = page(&server, "/metrics").await;
        let mut num_busy = 0;
        while !streams.is_empty() {
            let next = page(&server, "/metrics").await;
            let grown = next.growing();
            for (series, value) in last.growing() {
                assert!(grown.get(&series).is_some_and(|grown| *grown >= value), "{series:?}");
            }
            num_busy += usize::from(next.number("slipstream_num_requests_running") > 0.0);
            last = next;
            while let Some(ended) = streams.try_join_next() {
                ended.unwrap().unwrap();
            }
        }
        assert!(num_busy > 0, "no scrape saw a running request");
        is_at_rest(&page_at_rest(&server, 8.0).await);
        server.stop().await.unwrap();
    });
}

#[test]
fn probes_follow_the_stages() {
    block_on(async {
        let held = HeldLoading::begin();
        let server = LocalServer::start_loading(config(|_| {})).await.unwrap();
        let address = server.address();
        let mut health = HealthClient::new(server.channel());
        let watched = HealthCheckRequest { service: String::new() };
        let mut statuses = health.watch(watched).await.unwrap().into_inner();
        statuses.next().await.unwrap().unwrap();

        let alive = get(address, "/health").await;
        assert_eq!((alive.status, alive.json()["stage"].as_str()), (200, Some("loading")));
        let ready = get(address, "/ready").await;
        assert_eq!((ready.status, ready.json()["stage"].as_str()), (503, Some("loading")));
        assert_eq!(ready.json()["status"], "not ready");
        assert_eq!(ready.header("retry-after"), Some("1"));
        assert!(get(address, "/version").await.json()["fingerprint"].is_null());
        let stage = [("stage", "loading")];
        assert_eq!(page(&server, "/metrics").await.value("slipstream_stage", &stage), Some(1.0));
        assert!(page(&server, "/metrics/vllm").await.families.is_empty());

        drop(held);
        statuses.next().await.unwrap().unwrap();
        let ready = get(address, "/ready").await;
        assert_eq!((ready.status, ready.json()["status"].as_str()), (200, Some("ready")));
        assert_eq!(get(address, "/health").await.json()["stage"], "serving");
        let version = get(address, "/version").await.json();
        let started = stream(&client(&server), greedy(PROMPT, 2)).await.unwrap().started;
        assert_eq!(version["fingerprint"], started.fingerprint);
        assert_eq!(version["model"], started.model);
        let numerics = version["numerics_version"].to_string();
        let build = &page(&server, "/metrics").await.families["slipstream_build_info"].samples[0];
        assert_eq!(build.labels["numerics_version"], numerics);
        assert_eq!(version["isa"], build.labels["isa"]);
        assert_eq!(version["version"], build.labels["version"]);
        server.stop().await.unwrap();
    });
}

/// The gRPC status of a method that no server has.
async fn status_of_made_up_method(server: &LocalServer) -> Option<String> {
    let mut channel = server.channel();
    poll_fn(|context| channel.poll_ready(context)).await.unwrap();
    let call = http::Request::post("/made.up/Method").header("content-type", "application/grpc");
    let answer = channel.call(call.body(tonic::body::Body::empty()).unwrap()).await.unwrap();
    let status = answer.headers().get("grpc-status")?;
    Some(status.to_str().unwrap().to_owned())
}

#[test]
fn only_reading_is_allowed_and_queries_do_not_matter() {
    block_on(async {
        let server = start(|_| {}).await;
        let address = server.address();
        for path in ["/", "/health", "/ready", "/version", "/metrics", "/metrics/vllm"] {
            let read = get(address, path).await;
            assert_eq!(read.status, 200, "{path}");
            assert!(!read.body.is_empty(), "{path}");
            assert_eq!(get(address, &format!("{path}?a=%ff&&b")).await.status, 200, "{path}");
            let head = request(address, "HEAD", path).await;
            assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
            assert_eq!(head.header("content-type"), read.header("content-type"), "{path}");
            for method in ["POST", "PUT", "DELETE"] {
                let refused = request(address, method, path).await;
                assert_eq!(refused.status, 405, "{method} {path}");
                assert_eq!(refused.header("allow"), Some("GET,HEAD"), "{method} {path}");
            }
        }
        for path in ["/nothing", "/metrics/", "//", "/health/x"] {
            let lost = get(address, path).await;
            assert_eq!(lost.status, 404, "{path}");
            assert!(lost.body.contains("/metrics"), "{path}");
        }
        let page = page(&server, "/metrics").await;
        let answered = |path, status| {
            page.value("slipstream_http_requests_total", &[("path", path), ("status", status)])
        };
        assert_eq!((answered("/ready", "200"), answered("/ready", "405")), (Some(3.0), Some(3.0)));
        assert_eq!((answered("/ready", "503"), answered("other", "404")), (Some(0.0), Some(4.0)));
        let unimplemented = (Code::Unimplemented as i32).to_string();
        assert_eq!(status_of_made_up_method(&server).await, Some(unimplemented));
        server.stop().await.unwrap();
    });
}
