//! Owns a running `serve` of the built program: its log, its signals, its end. The test names the
//! program, because cargo tells only tests where it is.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use crate::micro_pair;

/// What every server here is started with: a free port, a log that can be read, and the micro pair.
pub const SERVE: [&str; 9] = {
    let [model, verifier, draft_model, draft] = micro_pair::FLAGS;
    let [listen, log] = ["--listen", "--log-format"];
    ["serve", listen, "127.0.0.1:0", log, "json", model, verifier, draft_model, draft]
};

/// A running server. Dropping it ends the process.
#[derive(Debug)]
pub struct Serving {
    process: Child,
    log: Receiver<serde_json::Value>,
    address: String,
}

impl Serving {
    /// Starts a command whose program is the server, without settings of the environment, and waits
    /// until it is ready.
    ///
    /// # Panics
    /// When it does not get that far.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let is_ours = |name: &OsStr| name.to_string_lossy().starts_with("SLIPSTREAM_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("the program starts");
        let stderr = BufReader::new(process.stderr.take().expect("stderr is a pipe"));
        let (sender, log) = channel();
        // Reads on to the end, so that the server never waits for a reader of its log.
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                let _ = sender.send(line); // the test may have failed meanwhile
            }
        });
        let mut serving = Self { process, log, address: String::new() };
        let listening = serving.until_logged("listening");
        let address = listening["fields"]["address"].as_str().expect("an address is logged");
        serving.address = address.to_owned();
        serving.until_logged("ready");
        serving
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The same, as tonic wants it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next line with this message.
    ///
    /// # Panics
    /// When the server ends without it.
    pub fn until_logged(&self, message: &str) -> serde_json::Value {
        let mut passed = Vec::new();
        while let Ok(line) = self.log.recv() {
            if line["fields"]["message"] == message {
                return line;
            }
            passed.push(line);
        }
        panic!("the server ended without logging {message:?}: {passed:?}");
    }

    /// Sends SIGTERM.
    ///
    /// # Panics
    /// When that cannot be done.
    pub fn terminate(&self) {
        let id = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", "TERM", &id]).status();
        assert!(sent.expect("there is a kill").success());
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When that cannot be done.
    #[must_use]
    pub fn wait(mut self) -> ExitStatus {
        self.process.wait().expect("it is our child")
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Most likely it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
