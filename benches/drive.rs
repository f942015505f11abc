//! Owns running completions on an engine in this process, without network: submit, step to the end,
//! collect. Knows neither models nor tables.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use slipstream_model::clock::Clock;
use slipstream_model::ids::{SequenceId, TokenId};
use slipstream_model::sampling::SamplingParams;
use slipstream_server::engine::Engine;
use slipstream_server::engine::event::{Event, Finished};
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, Speculation, TenantId};

/// What to complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Tokens of the prompt.
    pub prompt: Vec<TokenId>,
    /// Output tokens.
    pub num_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Whether and how to propose.
    pub speculation: Speculation,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The output.
    pub ids: Vec<TokenId>,
    /// How it ended, and what it cost.
    pub finished: Finished,
}

impl Completion {
    /// Seconds from the first token to the end.
    ///
    /// # Errors
    /// When no token came.
    pub fn decode_s(&self) -> anyhow::Result<f64> {
        let first = self.finished.timings.first_token.context("no token came")?;
        Ok(self.finished.timings.total.since(first).as_millis_f64() / 1000.0)
    }
}

/// An engine, driven by this thread. End tokens do not end completions.
pub struct Driver {
    engine: Engine,
    clock: Arc<dyn Clock>,
    next_id: u64,
    prefix_reuse: PrefixReuse,
}

impl Driver {
    /// `clock` as the engine has it.
    #[must_use]
    pub fn new(engine: Engine, clock: Arc<dyn Clock>) -> Self {
        // Rounds repeat their prompts, and each shall cost what the first one costs.
        Self { engine, clock, next_id: 0, prefix_reuse: PrefixReuse::Off }
    }

    /// Uses the KV of earlier prompts, and keeps it for later ones.
    #[must_use]
    pub fn with_prefix_reuse(mut self) -> Self {
        self.prefix_reuse = PrefixReuse::salted("");
        self
    }

    /// Id of the completion that is asked for next; those after it count on.
    #[must_use]
    pub fn next_id(&self) -> SequenceId {
        SequenceId(self.next_id)
    }

    /// Runs completions side by side, all to their ends.
    ///
    /// # Errors
    /// When the engine refuses one.
    pub fn run(&mut self, asked: &[Asked]) -> anyhow::Result<Vec<Completion>> {
        let mut running = BTreeMap::new();
        for asked in asked {
            let id = self.next_id();
            self.next_id += 1;
            self.engine.submit(id, self.request(asked))?;
            running.insert(id, Vec::new());
        }
        let mut done = BTreeMap::new();
        let mut news = Vec::new();
        while !running.is_empty() {
            self.engine.step();
            news.clear();
            self.engine.ids_with_news(&mut news);
            for id in &news {
                while let Some(event) = self.engine.take_event(*id) {
                    let ids = running.get_mut(id).context("news of something that has ended")?;
                    match event {
                        Event::Tokens(tokens) => ids.extend(tokens.tokens.iter().map(|t| t.id)),
                        Event::Finished(finished) => {
                            let ids = std::mem::take(ids);
                            running.remove(id);
                            done.insert(*id, Completion { ids, finished });
                            break;
                        }
                    }
                }
            }
        }
        Ok(done.into_values().collect())
    }

    fn request(&self, asked: &Asked) -> Request {
        let greedy = SamplingParams::greedy();
        Request {
            prompt: asked.prompt.clone(),
            output_prefix: Vec::new(),
            params: SamplingParams { temperature: asked.temperature, seed: 7, ..greedy },
            stop_strings: Vec::new(),
            max_tokens: asked.num_tokens,
            logprobs: false,
            speculation: asked.speculation,
            arrival: self.clock.now(),
            deadline: None,
            tenant: TenantId::default(),
            priority: Priority::Normal,
            prefix_reuse: self.prefix_reuse,
            sibling: None,
        }
    }
}
