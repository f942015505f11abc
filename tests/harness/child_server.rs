//! Owns a server as a process of its own: its start, what it logs, what the system says about its
//! memory and time. Knows the command line; knows nothing of the protocol.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use serde_json::Value;

use crate::micro_pair;

/// A running `serve` on a free loopback port. Dropping it ends the process.
#[derive(Debug)]
pub struct ChildServer {
    process: Child,
    log: Receiver<Value>,
    address: SocketAddr,
}

impl ChildServer {
    /// Starts this program with these arguments behind `serve` on the micro pair and waits until it
    /// is ready. No setting of the environment reaches it.
    ///
    /// # Panics
    /// When it does not get that far.
    #[must_use]
    pub fn start(program: &str, args: &[&str]) -> Self {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SLIPSTREAM_") {
                command.env_remove(name);
            }
        }
        command.args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"]);
        command.args(micro_pair::FLAGS).args(args);
        let mut process = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(process.stderr.take().expect("piped"));
        let (sender, log) = channel();
        // Reads on to the end, so that the server never waits for a reader of its log.
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Nobody may want to know any more.
                let _ = sender.send(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
        });
        let mut server = Self { process, log, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let listening = server.until_logged("listening");
        let address = listening["fields"]["address"].as_str().expect("it says where");
        server.address = address.parse().expect("an address");
        server.until_logged("ready");
        server
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next logged line with this message.
    ///
    /// # Panics
    /// When the log ends before.
    pub fn until_logged(&self, message: &str) -> Value {
        let mut passed = Vec::new();
        while let Ok(line) = self.log.recv() {
            if line["fields"]["message"] == message {
                return line;
            }
            passed.push(line);
        }
        panic!("the server ended without logging {message:?}: {passed:?}");
    }

    /// What it has logged since the last look.
    pub fn logged(&self) -> Vec<Value> {
        self.log.try_iter().collect()
    }

    /// Whether the process is still there.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Bytes of its memory that are in use; `None` where the system does not tell.
    #[must_use]
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    }

    /// Processor time so far of its threads whose names begin like this, in hundredths of a second;
    /// `None` where the system does not tell.
    #[must_use]
    pub fn cpu_ticks(&self, names: &str) -> Option<u64> {
        let mut ticks = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.process.id())).ok()? {
            // A thread may have ended since it was listed.
            let Ok(stat) = std::fs::read_to_string(thread.ok()?.path().join("stat")) else {
                continue;
            };
            let (before, fields) = stat.rsplit_once(')')?;
            if before.split_once('(')?.1.starts_with(names) {
                // User and system time are the fields 14 and 15; the third comes first here.
                let times = fields.split_whitespace().skip(11).take(2);
                ticks += times.map_while(|time| time.parse::<u64>().ok()).sum::<u64>();
            }
        }
        Some(ticks)
    }

    /// Tells it to end and waits for it: its exit code.
    ///
    /// # Panics
    /// When it cannot be told.
    pub fn stop(mut self) -> Option<i32> {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
        self.process.wait().unwrap().code()
    }
}

impl Drop for ChildServer {
    fn drop(&mut self) {
        // Most likely it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
