//! `slipstream chat`: a conversation in plain turns, for models that have no chat template. How
//! turns become a prompt is in `chat_prompt.rs`.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use serde_json::json;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use tokio::sync::mpsc;

use super::chat_prompt::{Conversation, STOP, Turn};
use super::client::{self, Completion, StreamError};
use super::explain;
use super::generate::interrupt;
use super::reach::Reached;
use super::request_flags::RequestFlags;
use super::result_json;
use crate::config::{FileFlag, ModelFlags};
use crate::grpc::limits;

/// Longest line of one turn, in bytes: a longer one would never be taken as a prompt.
const LINE_BYTES_MAX: u64 = limits::PROMPT_TEXT_BYTES_MAX as u64;
/// Output tokens of an answer unless --max-tokens says otherwise.
const ANSWER_TOKENS_DEFAULT: i32 = 256;

/// Said at the start of every conversation.
const NO_TEMPLATE: &str = "This model has no chat template: turns are written as `User: ...` / \
                           `Assistant: ...`, and an answer ends where the next `User:` begins. A \
                           base model goes on with the text rather than answer.";

const COMMANDS: &str = "\
/system TEXT  put TEXT before all turns; without TEXT, nothing
/reset        forget all turns
/help         this list
/exit         end, as ctrl-d does
ctrl-c ends an answer; at the prompt it ends the conversation.";

/// Flags of `slipstream chat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The models that this version serves have no chat templates, so a plain one is used: turns are \
written as `User: ...` / `Assistant: ...`. All turns are sent again with each question, until they \
do not fit the context any more; then the oldest are left out, and that is said.

Inside: /help, /system TEXT, /reset, /exit; ctrl-c ends an answer, ctrl-d the conversation. Where \
stdin is no terminal, each line is one turn and nothing is asked. Answers go to stdout, everything \
else to stderr; with --json each turn is one line with an object.

Examples:
  slipstream chat --system 'You write Rust.' --temperature 0.7
  slipstream chat --server http://127.0.0.1:50051
  printf 'Hi\\nAnd now?\\n' | slipstream chat --json")]
pub(super) struct ChatFlags {
    /// Ask this server, for example http://127.0.0.1:50051, instead of starting one. Of the flags
    /// about models only --model-name then applies
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Text before all turns
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Print one JSON object per turn
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    request: RequestFlags,
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    file: FileFlag,
}

/// Talks until the person ends it.
pub(super) async fn run(flags: ChatFlags, model_flags_given: &[String]) -> anyhow::Result<()> {
    let server = Reached::new(flags.server.as_deref(), &flags.model, model_flags_given).await?;
    let system = flags.system.clone();
    let mut chat = Chat {
        client: server.client.clone(),
        lines: Lines::start()?,
        conversation: Conversation { system, turns: Vec::new() },
        is_asking: io::stdin().is_terminal() && !flags.json,
        num_turns: 0,
        flags,
    };
    chat.say(NO_TEMPLATE)?;
    if chat.is_asking {
        chat.say("/help lists the commands.")?;
    }
    chat.talk().await?;
    drop(chat);
    server.leave().await
}

/// A conversation and the two sides of it.
struct Chat {
    client: client::Client,
    lines: Lines,
    conversation: Conversation,
    /// Whether somebody sits there: shows prompts.
    is_asking: bool,
    /// Turns so far, dropped ones included.
    num_turns: usize,
    flags: ChatFlags,
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wish<'a> {
    Nothing,
    Help,
    Reset,
    System(&'a str),
    Exit,
    Unknown(&'a str),
    Answer(&'a str),
}

fn wish(line: &str) -> Wish<'_> {
    let line = line.trim();
    if !line.starts_with('/') {
        return if line.is_empty() { Wish::Nothing } else { Wish::Answer(line) };
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match word {
        "/help" => Wish::Help,
        "/reset" => Wish::Reset,
        "/system" => Wish::System(rest.trim()),
        "/exit" | "/quit" => Wish::Exit,
        _ => Wish::Unknown(word),
    }
}

impl Chat {
    /// Tells the person something; stdout is for answers alone.
    fn say(&self, text: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{text}")
    }

    async fn talk(&mut self) -> anyhow::Result<()> {
        while let Some(line) = self.next_line().await? {
            match wish(&line) {
                Wish::Nothing => {}
                Wish::Help => self.say(COMMANDS)?,
                Wish::Reset => {
                    self.conversation.turns.clear();
                    self.say("All turns are forgotten.")?;
                }
                Wish::System(text) => {
                    let is_empty = text.is_empty();
                    self.conversation.system = (!is_empty).then(|| text.to_owned());
                    let with = if is_empty { "Nothing" } else { "That" };
                    self.say(&format!("{with} stands before all turns now."))?;
                }
                Wish::Exit => break,
                Wish::Unknown(word) => {
                    self.say(&format!("There is no command {word}.\n{COMMANDS}"))?;
                }
                Wish::Answer(user) => self.answer(user).await?,
            }
        }
        Ok(())
    }

    /// The next line; `None` at the end or when ctrl-c is pressed.
    async fn next_line(&mut self) -> anyhow::Result<Option<String>> {
        if self.is_asking {
            let mut out = io::stderr();
            write!(out, "> ")?;
            out.flush()?;
        }
        let line = tokio::select! {
            line = self.lines.next() => line?,
            () = interrupt() => None,
        };
        if line.is_none() && self.is_asking {
            self.say("")?;
        }
        Ok(line)
    }

    /// Asks, and leaves out the oldest turns until all of it fits.
    async fn answer(&mut self, user: &str) -> anyhow::Result<()> {
        self.num_turns += 1;
        let mut num_dropped = 0;
        let (completion, is_interrupted) = loop {
            let request = self.request(user, self.wanted_tokens());
            match self.stream(request).await {
                Ok(completion) => break (completion, false),
                Err(StreamError::Interrupted { partial }) => break (*partial, true),
                Err(StreamError::Call { status, .. }) if explain::is_too_long(&status) => {
                    if !self.conversation.drop_oldest() {
                        match self.last_attempt(user).await {
                            Ok(last) => break last,
                            Err(error) => return self.no_answer(error),
                        }
                    }
                    num_dropped += 1;
                }
                Err(error) => return self.no_answer(error),
            }
        };
        if num_dropped > 0 {
            let what = if num_dropped == 1 { "turn was" } else { "turns were" };
            self.say(&format!(
                "(the context is full: {num_dropped} more of the oldest {what} left out)"
            ))?;
        }
        self.show_end(user, &completion, (num_dropped, is_interrupted))?;
        let turn = Turn { user: user.to_owned(), assistant: completion.text };
        self.conversation.turns.push(turn);
        Ok(())
    }

    /// With no turn left to leave out, a shorter answer may still fit.
    async fn last_attempt(&mut self, user: &str) -> Result<(Completion, bool), StreamError> {
        let request = self.request(user, None);
        match self.stream(request).await {
            Ok(completion) => Ok((completion, false)),
            Err(StreamError::Interrupted { partial }) => Ok((*partial, true)),
            Err(error) => Err(error),
        }
    }

    /// A person at a terminal can try again; nobody else can.
    fn no_answer(&self, error: StreamError) -> anyhow::Result<()> {
        match &error {
            StreamError::Call { status, partial } if self.is_asking => {
                Ok(self.say(&format!("\n{}", explain::text(status, partial)))?)
            }
            StreamError::Call { .. } | StreamError::Interrupted { .. } | StreamError::Output(_) => {
                Err(error.into())
            }
        }
    }

    fn wanted_tokens(&self) -> Option<i32> {
        Some(self.flags.request.max_tokens().unwrap_or(ANSWER_TOKENS_DEFAULT))
    }

    fn request(&self, user: &str, max_tokens: Option<i32>) -> v1::GenerateRequest {
        let prompt = Prompt::Text(self.conversation.prompt(user));
        let mut message = self.flags.request.request(prompt);
        message.max_tokens = max_tokens;
        message.token_bytes = self.flags.json;
        message.logprobs = self.flags.json;
        message.stop_strings.push(STOP.to_owned());
        message.model = self.flags.model.model_name.clone().unwrap_or_default();
        // Each turn is a request of its own.
        message.request_id = message.request_id.map(|id| format!("{id}-{}", self.num_turns));
        message
    }

    async fn stream(&self, message: v1::GenerateRequest) -> Result<Completion, StreamError> {
        let is_json = self.flags.json;
        let mut is_first = true;
        let on_tokens = |event: &v1::Tokens| {
            if is_json {
                return Ok(());
            }
            // The template's blank before an answer is no part of what is shown.
            let text = if is_first { event.text.trim_start() } else { &event.text };
            is_first &= text.is_empty();
            let mut out = io::stdout().lock();
            write!(out, "{text}")?;
            out.flush()
        };
        let call = self.flags.request.call(message);
        client::stream_until(self.client.clone(), call, on_tokens, interrupt()).await
    }

    fn show_end(
        &self,
        user: &str,
        completion: &Completion,
        (num_dropped, is_interrupted): (usize, bool),
    ) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.flags.json {
            let mut object = result_json::completion(completion);
            let more = [
                ("turn", json!(self.num_turns)),
                ("user", json!(user)),
                ("turns_left_out", json!(num_dropped)),
                ("interrupted", json!(is_interrupted)),
            ];
            for (name, value) in more {
                object[name] = value;
            }
            return writeln!(out, "{object}");
        }
        writeln!(out)?;
        if is_interrupted {
            self.say("(interrupted)")?;
        }
        Ok(())
    }
}

/// Lines of stdin, read on a thread of their own: reading cannot be cancelled.
struct Lines {
    wanted: std::sync::mpsc::Sender<()>,
    read: mpsc::Receiver<io::Result<Option<String>>>,
}

impl Lines {
    fn start() -> io::Result<Self> {
        let (wanted, wishes) = std::sync::mpsc::channel();
        let (sender, read) = mpsc::channel(1);
        std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
            while wishes.recv().is_ok() {
                if sender.blocking_send(read_line(&mut io::stdin().lock())).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { wanted, read })
    }

    /// The next line without its end; `None` at the end of stdin.
    async fn next(&mut self) -> anyhow::Result<Option<String>> {
        let _ = self.wanted.send(()); // without the thread there is no line either
        let line = self.read.recv().await.unwrap_or(Ok(None));
        line.map_err(|error| anyhow::anyhow!("cannot read stdin: {error}"))
    }
}

fn read_line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    from.take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() as u64 > LINE_BYTES_MAX {
        let problem = format!("a line has more than {LINE_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let line = String::from_utf8(bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a line is not UTF-8 text"))?;
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{LINE_BYTES_MAX, Wish, read_line, wish};

    #[test]
    fn lines_are_commands_or_turns() {
        assert_eq!(wish("  "), Wish::Nothing);
        assert_eq!(wish("/system Be brief. "), Wish::System("Be brief."));
        assert_eq!(wish("/system"), Wish::System(""));
        assert_eq!(wish("/exit"), Wish::Exit);
        assert_eq!(wish("/quit now"), Wish::Exit);
        assert_eq!(wish("/what"), Wish::Unknown("/what"));
        assert_eq!(wish(" Hi / there"), Wish::Answer("Hi / there"));
    }

    #[test]
    fn lines_are_bounded() {
        let mut two = &b"a\r\nb"[..];
        let mut next = || read_line(&mut two).expect("readable");
        assert_eq!([next(), next(), next()], [Some("a".to_owned()), Some("b".to_owned()), None]);
        let long = vec![b'a'; LINE_BYTES_MAX as usize + 1];
        assert!(read_line(&mut &long[..]).is_err());
        assert!(read_line(&mut &b"\xff\n"[..]).is_err());
    }
}
