//! Proves what becomes of a server whose engine cannot go on: a verifier that keeps failing or
//! panics ends it by rule, one that hangs makes its probes fail and then ends it; every call gets
//! a status, and a step that was merely late changes nothing.

use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slipstream_model::batch::RaggedBatch;
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::BlockId;
use slipstream_proto::v1;
use slipstream_server::RunError;
use slipstream_server::config::Config;
use slipstream_server::local::{LocalServer, LocalServerError, connect};
use slipstream_server::startup::Around;
use slipstream_tests::client::{
    Client, PATIENCE, block_on, client, config, greedy, read_on, stream, url,
};
use slipstream_tests::plain_http::get;
use slipstream_tests::serving::Serving;
use tonic::{Code, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");
const PROMPT: &str = "use std::collections::HashMap;\n";
/// Output that fills the micro verifier's context of 1024 after `PROMPT`.
const LONG: i32 = 1000;

/// What the next forward passes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Works,
    Fails,
    Panics,
    /// Waits for another mood.
    Hangs,
}

/// The mood, and whether a pass hangs in it now.
struct State {
    mood: Mood,
    is_hanging: bool,
}

/// Sets how a verifier behaves that a server owns.
#[derive(Clone)]
struct Switch(Arc<(Mutex<State>, Condvar)>);

impl Switch {
    fn new(mood: Mood) -> Self {
        Self(Arc::new((Mutex::new(State { mood, is_hanging: false }), Condvar::new())))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mood: Mood) {
        self.lock().mood = mood;
        self.0.1.notify_all();
    }

    fn until_it_hangs(&self) {
        let (_, changed) = &*self.0;
        let (state, timeout) =
            changed.wait_timeout_while(self.lock(), PATIENCE, |state| !state.is_hanging).unwrap();
        drop(state);
        assert!(!timeout.timed_out(), "no pass was asked for");
    }

    /// For the server that shall have this verifier.
    fn around(&self) -> Around {
        let switch = self.clone();
        Box::new(|network| Box::new(Moody { network, switch }))
    }
}

/// A verifier that does what its switch says.
struct Moody {
    network: Box<dyn Forward>,
    switch: Switch,
}

impl Forward for Moody {
    fn limits(&self) -> ForwardLimits {
        self.network.limits()
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        let mut state = self.switch.lock();
        match state.mood {
            Mood::Works => {}
            Mood::Fails => return Err(ForwardError::Failed("on demand".to_owned())),
            Mood::Panics => {
                drop(state);
                panic!("on demand");
            }
            Mood::Hangs => {
                state.is_hanging = true;
                let (_, changed) = &*self.switch.0;
                changed.notify_all();
                let wait = changed.wait_while(state, |state| state.mood == Mood::Hangs);
                wait.unwrap_or_else(PoisonError::into_inner).is_hanging = false;
            }
        }
        self.network.forward(batch, logits)
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.network.copy_block(from, to);
    }
}

/// One request at a time, others wait.
fn one_at_a_time() -> Config {
    config(|flags| flags.max_running = 1)
}

async fn start(config: Config, switch: &Switch) -> LocalServer {
    LocalServer::start_around(config, switch.around()).await.unwrap()
}

/// Opens long streams and waits for the first event of each.
async fn open(client: &Client, num: usize) -> Vec<Streaming<v1::GenerateEvent>> {
    let mut streams = Vec::new();
    for _ in 0..num {
        let call = client.clone().generate(greedy(PROMPT, LONG)).await;
        let mut events = call.unwrap().into_inner();
        events.message().await.unwrap().expect("Started");
        streams.push(events);
    }
    streams
}

/// The codes that these streams end with.
async fn codes(streams: Vec<Streaming<v1::GenerateEvent>>) -> Vec<Code> {
    let mut codes = Vec::new();
    for mut events in streams {
        let (_, status) = read_on(&mut events, Vec::new()).await;
        codes.push(status.map_or(Code::Ok, |status| status.code()));
    }
    codes
}

/// Waits until gRPC health says this.
async fn until_health(server: &LocalServer, wanted: ServingStatus) {
    let mut health = HealthClient::new(server.channel());
    let begun = Instant::now();
    loop {
        let request = HealthCheckRequest { service: String::new() };
        if health.check(request).await.unwrap().into_inner().status() == wanted {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "health never says {wanted:?}");
        tokio::task::yield_now().await;
    }
}

async fn run_error(server: LocalServer) -> RunError {
    match tokio::time::timeout(PATIENCE, server.stop()).await.expect("it ends") {
        Err(LocalServerError::Run(error)) => error,
        other => panic!("the server ended as if nothing had been wrong: {other:?}"),
    }
}

#[test]
fn a_verifier_that_keeps_failing_ends_the_server_by_rule() {
    block_on(async {
        let switch = Switch::new(Mood::Works);
        let server = start(one_at_a_time(), &switch).await;
        let client = client(&server);
        // One failure ends its batch and nothing else.
        switch.set(Mood::Fails);
        let failed = stream(&client, greedy(PROMPT, 2)).await.unwrap_err();
        assert_eq!(failed.code(), Code::Internal, "{failed:?}");
        switch.set(Mood::Works);
        assert_eq!(stream(&client, greedy(PROMPT, 2)).await.unwrap().tokens.len(), 2);
        // Three in a row end the engine. They are those of the first three requests.
        let streams = open(&client, 5).await;
        switch.set(Mood::Fails);
        let internal = Code::Internal;
        let gone = Code::Unavailable;
        assert_eq!(codes(streams).await, [internal, internal, internal, gone, gone]);
        let error = run_error(server).await;
        assert!(matches!(error, RunError::VerifierFailed), "{error:?}");
    });
}

#[test]
fn a_verifier_that_panics_ends_the_server_by_rule() {
    block_on(async {
        let switch = Switch::new(Mood::Works);
        let server = start(one_at_a_time(), &switch).await;
        let streams = open(&client(&server), 3).await;
        switch.set(Mood::Panics);
        assert_eq!(codes(streams).await, [Code::Internal, Code::Unavailable, Code::Unavailable]);
        let error = run_error(server).await;
        assert!(matches!(error, RunError::VerifierFailed), "{error:?}");
    });
}

#[test]
fn an_engine_that_hangs_is_given_up_and_its_calls_have_a_status() {
    for is_draining in [false, true] {
        block_on(async {
            let mut config = one_at_a_time();
            config.edge.grace = PATIENCE;
            config.edge.step_limit = Duration::from_millis(40);
            let switch = Switch::new(Mood::Works);
            let server = start(config, &switch).await;
            let address = url(&server);
            let streams = open(&client(&server), 3).await;
            let waiting = tokio::spawn({
                let mut client = client(&server);
                async move { client.complete(greedy(PROMPT, LONG)).await }
            });
            switch.set(Mood::Hangs);
            switch.until_it_hangs();
            if is_draining {
                server.drain();
            }
            assert_eq!(codes(streams).await, [Code::Unavailable; 3], "draining: {is_draining}");
            assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Unavailable);
            let error = run_error(server).await;
            let RunError::EngineHung { age, limit } = error else { panic!("{error:?}") };
            assert!(age > 2 * limit && limit == Duration::from_millis(40), "{age:?}");
            assert!(connect(&address).await.is_err(), "the port is still open");
            switch.set(Mood::Works); // so that its thread ends
        });
    }
}

#[test]
fn a_late_step_makes_probes_fail_until_it_is_over() {
    block_on(async {
        let mut config = one_at_a_time();
        config.edge.step_limit = Duration::from_millis(1500);
        let switch = Switch::new(Mood::Works);
        let server = start(config, &switch).await;
        let streams = open(&client(&server), 2).await;
        switch.set(Mood::Hangs);
        switch.until_it_hangs();
        let begun = Instant::now();
        let sick = loop {
            let health = get(server.address(), "/health").await;
            if health.status != 200 {
                break health;
            }
            assert!(begun.elapsed() < PATIENCE, "health never says that the engine hangs");
            tokio::task::yield_now().await;
        };
        let ready = get(server.address(), "/ready").await;
        until_health(&server, ServingStatus::NotServing).await;
        switch.set(Mood::Works);
        assert_eq!((sick.status, ready.status), (503, 503));
        let reason = sick.json()["reason"].as_str().unwrap().to_owned();
        assert!(reason.contains("1.5s") && reason.contains("--step-limit"), "{reason}");
        // It is over: everything goes on as if nothing had been.
        assert_eq!(codes(streams).await, [Code::Ok; 2]);
        until_health(&server, ServingStatus::Serving).await;
        assert_eq!(get(server.address(), "/health").await.status, 200);
        assert_eq!(get(server.address(), "/ready").await.status, 200);
        server.stop().await.unwrap();
    });
}

#[test]
fn the_process_of_a_hung_engine_ends_with_a_code_of_its_own() {
    // A prompt of 2,000 tokens in one step takes far longer than twice the shortest limit.
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--listen=127.0.0.1:0", "--log-format=json", "--step-limit=10ms"]);
    command.args(["--step-tokens=4096", "--threads=1", "--draft-model=none"]);
    let serving = Serving::start({
        command.stdout(Stdio::null());
        command
    });
    block_on(async {
        let client = Client::new(connect(&serving.url()).await.unwrap());
        let prompt = v1::TokenIds { ids: (0..2000).map(|index| 300 + index % 50).collect() };
        let request = v1::GenerateRequest {
            prompt: Some(v1::generate_request::Prompt::TokenIds(prompt)),
            ..greedy("", 4)
        };
        let status = stream(&client, request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    });
    let logged = serving.until_logged("the engine hangs inside a step");
    assert_eq!(logged["fields"]["limit_ms"], 10);
    assert!(logged["fields"]["age_ms"].as_u64().unwrap() >= 10, "{logged}");
    serving.until_logged("giving the engine up");
    assert_eq!(serving.wait().code(), Some(4));
}
