//! Owns who arrives in a world and what it asks: tenants, bursts, prompts that begin like others,
//! groups of samples, deadlines, and requests with one thing wrong. Knows what a refusal must leave
//! behind: nothing.

use slipstream_model::clock::{Clock, Micros};
use slipstream_model::ids::{BLOCK_LEN, SequenceId, TokenId};
use slipstream_server::engine::Counters;
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, SubmitError, TenantId};

use super::climate::{Climate, Customs};
use super::readers::Client;
use super::{World, is_live, require};
use crate::random::Rng;
use crate::reference::decode;
use crate::requests::{RequestSizes, random_request, random_tokens};

/// Samples of one request at most.
const SAMPLES_MAX: usize = 4;

/// Earlier conversations that later requests may go on from, at most.
const CONVERSATIONS_MAX: usize = 16;

/// What the clients of a world have in common.
#[derive(Debug)]
pub(super) struct Population {
    customs: Customs,
    sizes: RequestSizes,
    system_prompts: Vec<Vec<TokenId>>,
    /// Prompt and output of earlier requests, with whose they were.
    conversations: Vec<(TenantId, Vec<TokenId>)>,
    num_left: usize,
}

impl Population {
    pub(super) fn new(rng: &mut Rng, climate: &Climate) -> Self {
        let (customs, sizes) = (climate.customs.clone(), climate.sizes);
        let system_prompts = (0..customs.num_system_prompts).map(|_| {
            // Around the edges of KV blocks, where off-by-one errors live.
            let edge = BLOCK_LEN * rng.between(1, 4) + rng.between(0, 2) - 1;
            random_tokens(rng, sizes.vocab_size, edge.min(sizes.prompt_len_max))
        });
        Self {
            system_prompts: system_prompts.collect(),
            num_left: customs.num_requests,
            conversations: Vec::new(),
            customs,
            sizes,
        }
    }

    /// How many come at once now.
    fn burst(&mut self, rng: &mut Rng) -> usize {
        if !rng.one_in(4) {
            return 0;
        }
        let size = rng.heavy(self.customs.burst_max * 8).max(1).min(self.num_left);
        self.num_left -= size;
        size
    }

    fn tenant(&self, rng: &mut Rng) -> TenantId {
        let is_flood = self.customs.is_flooded && !rng.one_in(5);
        let tenant = if is_flood { 0 } else { rng.below(self.customs.num_tenants) };
        TenantId(tenant as u128)
    }

    fn priority(&self, rng: &mut Rng) -> Priority {
        if self.customs.has_classes { *rng.pick(&Priority::ALL) } else { Priority::Normal }
    }

    fn reuse(&self, rng: &mut Rng) -> PrefixReuse {
        if rng.one_in(self.customs.reuse_off_one_in) {
            return PrefixReuse::Off;
        }
        PrefixReuse::salted(["", "pepper"][rng.below(self.customs.num_salts)])
    }

    /// A prompt: random, or a beginning that others have too with something behind it.
    fn prompt(&self, rng: &mut Rng, random: Vec<TokenId>, tenant: TenantId) -> Vec<TokenId> {
        let mut prompt = Vec::new();
        // Sometimes what another tenant said: nothing of its KV may be used.
        let is_foreign = rng.one_in(4);
        let said = self.conversations.iter().filter(|(whose, _)| is_foreign || *whose == tenant);
        let said: Vec<&Vec<TokenId>> = said.map(|(_, tokens)| tokens).collect();
        if !said.is_empty() && rng.one_in(self.customs.follow_up_one_in) {
            prompt.clone_from(*rng.pick(&said[..]));
        } else if !self.system_prompts.is_empty() && !rng.one_in(4) {
            prompt.clone_from(rng.pick(&self.system_prompts));
        }
        let behind = if prompt.is_empty() { random.len() } else { rng.below(20) };
        prompt.extend_from_slice(&random[..behind.min(random.len())]);
        prompt.truncate(self.sizes.prompt_len_max);
        if prompt.is_empty() { random } else { prompt }
    }

    /// One request, at a moment.
    fn request(&self, rng: &mut Rng, pieces: &[Vec<u8>], now: Micros) -> Request {
        let mut request = random_request(rng, self.sizes, pieces);
        request.tenant = self.tenant(rng);
        request.priority = self.priority(rng);
        request.prefix_reuse = self.reuse(rng);
        request.prompt = self.prompt(rng, request.prompt, request.tenant);
        request.arrival = now;
        if rng.one_in(self.customs.deadline_one_in) {
            let left = *rng.pick(&[0, 500, 20_000, 200_000]);
            request.deadline = Some(now.plus(Micros(rng.below(left + 1) as u64)));
        }
        request
    }

    /// Remembers what was said, for later requests to go on from.
    fn remember(&mut self, rng: &mut Rng, tenant: TenantId, tokens: Vec<TokenId>) {
        if self.conversations.len() == CONVERSATIONS_MAX {
            self.conversations.swap_remove(rng.below(CONVERSATIONS_MAX));
        }
        self.conversations.push((tenant, tokens));
    }
}

impl World {
    /// Whoever comes before this step.
    pub(super) fn arrivals(&mut self) -> Result<(), String> {
        for _ in 0..self.population.burst(&mut self.rng) {
            let mut rng = self.rng.fork(self.next_id);
            let request = self.population.request(&mut rng, &self.pieces, self.clock.now());
            if rng.one_in(10) {
                self.arrive_badly(request, &mut rng)?;
            } else if rng.one_in(self.climate.customs.siblings_one_in) {
                self.arrive_together(&request, &mut rng)?;
            } else {
                self.arrive(request, &mut rng)?;
            }
        }
        Ok(())
    }

    /// Several samples of one request. All but the first may share its prompt's KV.
    fn arrive_together(&mut self, request: &Request, rng: &mut Rng) -> Result<(), String> {
        let leader = SequenceId(self.next_id);
        for index in 0..rng.between(2, SAMPLES_MAX) {
            let mut sample = request.clone();
            sample.params.sample_index = u32::try_from(index).unwrap();
            sample.sibling = (index > 0).then_some(leader);
            if rng.one_in(40) {
                sample.sibling = Some(SequenceId(u64::MAX - 1)); // nobody's
            }
            self.arrive(sample, rng)?;
        }
        Ok(())
    }

    /// One request: taken, or refused for a reason that holds.
    fn arrive(&mut self, mut request: Request, rng: &mut Rng) -> Result<(), String> {
        let id = self.take_id();
        let mut expected = decode(&mut self.oracle, &self.pieces, &request, id.0);
        if rng.one_in(self.climate.customs.prefix_one_in) {
            let cut = rng.below(expected.tokens.len() + 1);
            request.output_prefix = expected.tokens[..cut].to_vec();
            expected = decode(&mut self.oracle, &self.pieces, &request, id.0);
            self.coverage.note("resumed", 1);
        }
        let before = *self.engine.counters();
        let result = self.engine.submit(id, request.clone());
        if let Err(error) = result {
            return self.check_refusal(&request, &error, &before);
        }
        let known = [&request.prompt[..], &request.output_prefix].concat();
        let said = [&known[..], &expected.tokens].concat();
        let future = [&known[..], &expected.chosen].concat();
        self.population.remember(rng, request.tenant, said);
        self.knowledge.learn(id, future.clone());
        self.checker.admit(id, &request, future, self.clock.now());
        let reads_one_in = *rng.pick(self.climate.customs.reads_one_in);
        self.clients.insert(id, Client::new(request, expected, reads_one_in));
        self.checker.between_steps(&self.engine)
    }

    /// A valid request was refused: because of the queue or its deadline, and nothing else changed.
    fn check_refusal(
        &mut self,
        request: &Request,
        error: &SubmitError,
        before: &Counters,
    ) -> Result<(), String> {
        let mut wanted = *before;
        let config = self.climate.config;
        match *error {
            SubmitError::QueueFull { limit, .. } => {
                let is_right = limit == config.max_running + config.max_waiting;
                let live = || self.engine.sequences().filter(|view| is_live(view.phase));
                let num_own = live().filter(|view| view.tenant == request.tenant).count();
                // Where there are enough, one tenant may take all places but a sixteenth.
                let num_kept = if limit < 64 { 0 } else { limit / 16 };
                let is_full = live().count() >= limit || num_own >= limit - num_kept;
                require(is_right && is_full, || format!("{num_own} of its own: {error}"))?;
                wanted.shed += 1;
                self.coverage.note("shed", 1);
            }
            SubmitError::TooLate { left, needed } => {
                let deadline = request.deadline.ok_or("too late without a deadline")?;
                let is_right = left == deadline.since(self.clock.now());
                require(is_right && left <= needed, || format!("{deadline:?}: {error}"))?;
                wanted.refused_late += 1;
                self.coverage.note("refused late", 1);
            }
            SubmitError::TooManyRequests { .. }
            | SubmitError::NeverFits { .. }
            | SubmitError::OverContext { .. }
            | SubmitError::Invalid(_)
            | SubmitError::ShuttingDown => {
                return Err(format!("a valid request was refused: {error}"));
            }
        }
        let now = *self.engine.counters();
        require(now == wanted, || format!("a refusal changed {before:?} to {now:?}"))?;
        self.checker.between_steps(&self.engine)
    }

    /// A request with one thing wrong must be refused and leave nothing behind.
    fn arrive_badly(&mut self, mut request: Request, rng: &mut Rng) -> Result<(), String> {
        let beyond = TokenId(u32::try_from(self.climate.sizes.vocab_size).unwrap());
        request.deadline = None;
        match rng.below(6) {
            0 => request.prompt.clear(),
            1 => request.prompt.push(beyond),
            2 => request.output_prefix = vec![TokenId(u32::MAX)],
            3 => request.max_tokens = 0,
            4 => request.max_tokens = self.climate.verifier.limits.context_len,
            _ => request.stop_strings.push(Vec::new()),
        }
        let before = *self.engine.counters();
        let id = self.take_id();
        let refusal = self.engine.submit(id, request);
        self.coverage.note("refused", 1);
        let is_unchanged = *self.engine.counters() == before;
        require(refusal.is_err() && is_unchanged, || {
            format!("a bad request was taken or counted: {refusal:?}")
        })?;
        self.checker.between_steps(&self.engine)
    }

    fn take_id(&mut self) -> SequenceId {
        self.next_id += 1;
        SequenceId(self.next_id - 1)
    }
}
