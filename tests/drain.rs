//! Proves how a server ends: what runs is finished within the grace, probes hear meanwhile that it
//! is not ready, the rest gets a status, a second signal ends everything at once, and systemd hears
//! each stage.

use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::generate_event::Event;
use slipstream_server::RunError;
use slipstream_server::local::{LocalServer, LocalServerError, connect};
use slipstream_tests::client::{Client, block_on, client, config, greedy, sampled, stream};
use slipstream_tests::serving::{SERVE, Serving};
use tokio::task::JoinSet;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const PROGRAM: &str = env!("CARGO_BIN_EXE_slipstream-under-test");
const PROMPT: &str = "use std::collections::HashMap;\n";
/// Far longer than anything here takes: only a server that hangs reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

fn serving(flags: &[&str]) -> Serving {
    let mut command = Command::new(PROGRAM);
    command.args(SERVE).args(flags).stdout(Stdio::null());
    Serving::start(command)
}

/// Opens streams and waits for the first event of each.
async fn open(client: &Client, num: u64, max_tokens: i32) -> Vec<Streaming<v1::GenerateEvent>> {
    let mut streams = Vec::new();
    for seed in 0..num {
        let call = client.clone().generate(sampled(PROMPT, max_tokens, seed)).await;
        let mut events = call.unwrap().into_inner();
        events.message().await.unwrap().expect("Started");
        streams.push(events);
    }
    streams
}

/// Reads a stream to its end: whether that was `Finished`.
async fn read_on(mut events: Streaming<v1::GenerateEvent>) -> Result<bool, Status> {
    let mut last = None;
    while let Some(event) = events.message().await? {
        last = event.event;
    }
    Ok(matches!(last, Some(Event::Finished(_))))
}

fn read_all(streams: Vec<Streaming<v1::GenerateEvent>>) -> JoinSet<Result<bool, Status>> {
    streams.into_iter().map(read_on).collect()
}

/// What health says on a connection of its own.
async fn health(url: &str) -> ServingStatus {
    let mut health = HealthClient::new(connect(url).await.unwrap());
    let request = HealthCheckRequest { service: String::new() };
    health.check(request).await.unwrap().into_inner().status()
}

async fn until_not_serving(url: &str) {
    let begun = Instant::now();
    while health(url).await != ServingStatus::NotServing {
        assert!(begun.elapsed() < PATIENCE, "health never says that the server goes");
    }
}

#[test]
fn fifty_streams_finish_and_probes_hear_that_the_server_goes() {
    let serving = serving(&["--grace", "600s"]);
    block_on(async {
        let client = Client::new(connect(&serving.url()).await.unwrap());
        let mut readers = read_all(open(&client, 50, 300).await);
        assert_eq!(health(&serving.url()).await, ServingStatus::Serving);
        serving.terminate();
        serving.until_logged("draining");
        until_not_serving(&serving.url()).await;
        let late = Client::new(connect(&serving.url()).await.unwrap());
        let refused = stream(&late, greedy(PROMPT, 2)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        while let Some(result) = readers.join_next().await {
            assert!(result.unwrap().unwrap(), "a stream ended without Finished");
        }
    });
    assert_eq!(serving.wait().code(), Some(0));
}

#[test]
fn what_the_grace_does_not_cover_is_no_failure_of_the_process() {
    let serving = serving(&["--grace", "0s"]);
    block_on(async {
        let client = Client::new(connect(&serving.url()).await.unwrap());
        let mut readers = read_all(open(&client, 24, 1000).await);
        serving.terminate();
        let mut num_cut = 0;
        while let Some(result) = readers.join_next().await {
            if let Err(status) = result.unwrap() {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                assert!(status.message().contains("output_prefix"), "{status:?}");
                num_cut += 1;
            }
        }
        assert!(num_cut > 0, "every completion was faster than the stop");
    });
    assert_eq!(serving.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_everything_at_once_with_its_status() {
    let serving = serving(&["--grace", "600s"]);
    block_on(async {
        let client = Client::new(connect(&serving.url()).await.unwrap());
        let mut readers = read_all(open(&client, 48, 1000).await);
        // Tools tell a process and then its group: two signals at once are one.
        serving.terminate();
        serving.terminate();
        serving.until_logged("draining");
        // What a person does takes longer.
        tokio::time::sleep(Duration::from_millis(100)).await;
        serving.terminate();
        let mut num_cut = 0;
        while let Some(result) = readers.join_next().await {
            if let Err(status) = result.unwrap() {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                num_cut += 1;
            }
        }
        assert!(num_cut > 0, "every completion was faster than the second signal");
    });
    assert_eq!(serving.wait().code(), Some(1));
}

#[test]
fn a_server_in_this_process_is_forced_the_same_way() {
    block_on(async {
        let mut settings = config(|_| {});
        settings.edge.grace = Duration::from_secs(600);
        let server = LocalServer::start(settings).await.unwrap();
        let url = format!("http://{}", server.address());
        let mut readers = read_all(open(&client(&server), 24, 1000).await);
        server.drain();
        until_not_serving(&url).await;
        server.force();
        let ended = server.stop().await;
        assert!(matches!(ended, Err(LocalServerError::Run(RunError::Forced))), "{ended:?}");
        while let Some(result) = readers.join_next().await {
            if let Err(status) = result.unwrap() {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            }
        }
        assert!(connect(&url).await.is_err(), "the port is still open");
    });
}

#[test]
fn systemd_hears_every_stage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut buffer = [0; 512];
        let len = socket.recv(&mut buffer).expect("systemd is told");
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    };
    let mut command = Command::new(PROGRAM);
    command.args(SERVE).env("NOTIFY_SOCKET", &path).stdout(Stdio::null());
    let serving = Serving::start(command);
    assert_eq!(hear(), "STATUS=loading\n");
    assert_eq!(hear(), "READY=1\nSTATUS=serving\n");
    serving.terminate();
    assert_eq!(hear(), "STOPPING=1\nSTATUS=draining\n");
    assert_eq!(serving.wait().code(), Some(0));
}
