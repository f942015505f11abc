//! Owns a server as a process of its own, as a user would start it: its address, its log, its end.
//! Knows the command line; the path of the program comes from the test, for which cargo builds it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::micro_pair;

/// A running `serve` on a free loopback port. Dropping it ends the process.
#[derive(Debug)]
pub struct ServerProcess {
    process: Child,
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl ServerProcess {
    /// Starts `program serve` on the micro pair with these flags, without the environment's
    /// settings, and waits until it is ready.
    ///
    /// # Panics
    /// With the log, when the server ends before it is ready.
    #[must_use]
    pub fn start(program: &str, flags: &[&str]) -> Self {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SLIPSTREAM_") {
                command.env_remove(name);
            }
        }
        let mut process = command
            .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(micro_pair::FLAGS)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let stderr = BufReader::new(process.stderr.take().expect("stderr is a pipe"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (sender, lines) = channel();
        // Reads on to the end, so that the server never waits for a reader of its log.
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in stderr.lines().map_while(Result::ok) {
                    log.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
                    let _ = sender.send(line); // nobody waits once the server is ready
                }
            }
        });
        let address = until_logged(&lines, "listening")["fields"]["address"]
            .as_str()
            .and_then(|address| address.parse().ok())
            .expect("the line names the address");
        until_logged(&lines, "ready");
        Self { process, address, log }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has logged, line by line.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The next line with this message.
fn until_logged(lines: &Receiver<String>, message: &str) -> serde_json::Value {
    let mut passed = Vec::new();
    while let Ok(line) = lines.recv() {
        let value: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        if value["fields"]["message"] == message {
            return value;
        }
        passed.push(line);
    }
    panic!("the server ended without logging {message:?}:\n{}", passed.join("\n"));
}
