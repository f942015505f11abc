//! Owns drafts that agree with the verifier as often as they are told to, at the cost of a real
//! network: its forward passes are run, and then its logits are overruled. The model proposer above
//! it chooses, catches up and remembers as it always does, and its KV is that of the tokens it
//! proposed. Knows the outputs to come, from a plain run; knows no engine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use slipstream_model::batch::RaggedBatch;
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, SequenceId, TokenId};

/// Logit of the token that a draft shall propose: beyond what noise could change.
const CERTAIN: f32 = 1e6;

/// What the draft of an engine shall propose. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Script(Arc<Mutex<Knowledge>>);

#[derive(Debug, Default)]
struct Knowledge {
    /// Probability with which a token agrees, position by position.
    rate: f64,
    futures: BTreeMap<u64, Future>,
}

/// All tokens that a sequence will ever have.
#[derive(Debug)]
struct Future {
    tokens: Vec<TokenId>,
    /// Key of its coins.
    seed: u64,
}

impl Script {
    /// Sets how often the draft is right, 0 to 1.
    pub fn set_rate(&self, rate: f64) {
        self.with(|knowledge| knowledge.rate = rate);
    }

    /// Tells the tokens that a sequence will have, prompt and output. The same `seed` errs at the
    /// same positions.
    pub fn learn(&self, sequence: SequenceId, tokens: Vec<TokenId>, seed: u64) {
        self.with(|knowledge| knowledge.futures.insert(sequence.0, Future { tokens, seed }));
    }

    /// Forgets all sequences: the draft then proposes what its network says.
    pub fn forget(&self) {
        self.with(|knowledge| knowledge.futures.clear());
    }

    fn with<T>(&self, act: impl FnOnce(&mut Knowledge) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Knowledge {
    /// What to propose at a position, if anything is known about it. A wrong token is the right
    /// one's neighbour.
    fn token(&self, owner: u64, position: usize, vocab_size: usize) -> Option<usize> {
        let future = self.futures.get(&owner)?;
        let right = future.tokens.get(position)?.index();
        let agrees = coin(future.seed, position) < self.rate;
        Some(if agrees { right } else { (right + 1) % vocab_size })
    }
}

/// A fixed number in [0, 1) for every seed and position (the finaliser of SplitMix64, Steele, Lea
/// and Flood, OOPSLA 2014).
fn coin(seed: u64, position: usize) -> f64 {
    let mut bits = seed.wrapping_mul(0xD134_2543_DE82_EF95).wrapping_add(position as u64 + 1);
    bits = bits.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A draft's network whose choices are overruled.
pub struct Overruled {
    network: Box<dyn Forward>,
    script: Script,
}

impl Overruled {
    /// `network` does the work, `script` has the say.
    #[must_use]
    pub fn new(network: Box<dyn Forward>, script: Script) -> Self {
        Self { network, script }
    }
}

impl Forward for Overruled {
    fn limits(&self) -> ForwardLimits {
        self.network.limits()
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        self.network.forward(batch, logits)?;
        let vocab_size = self.limits().vocab_size;
        self.script.with(|knowledge| {
            let mut row = 0;
            for segment in batch.segments() {
                for offset in segment.logits_from..segment.rows.len() {
                    // A row gives the token behind its own.
                    let position = segment.start + offset + 1;
                    if let Some(token) = knowledge.token(segment.owner, position, vocab_size) {
                        logits.row_mut(row)[token] = CERTAIN;
                    }
                    row += 1;
                }
            }
        });
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.network.copy_block(from, to);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slipstream_model::clock::{Clock, MonotonicClock};
    use slipstream_server::engine::request::Speculation;

    use super::{Script, coin};
    use crate::drive::{Asked, Driver};
    use crate::pair::{Pair, PairOptions};
    use crate::{MICRO_DRAFT, MICRO_VERIFIER, PROMPTS};

    #[test]
    fn coins_are_fair_and_fixed() {
        let coins: Vec<f64> = (0..10_000).map(|position| coin(3, position)).collect();
        let mean = coins.iter().sum::<f64>() / coins.len() as f64;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert!(coins.iter().all(|coin| (0.0..1.0).contains(coin)));
        assert_eq!(coins[7], coin(3, 7));
        assert!(coin(4, 7) != coin(3, 7));
    }

    /// Share of the proposed tokens that is accepted at each rate.
    fn acceptance(temperature: f64, rates: &[f64]) -> Vec<f64> {
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
        let options = PairOptions { threads: 1, positions: 1024, ..PairOptions::default() };
        let script = Script::default();
        let paths = [MICRO_VERIFIER, MICRO_DRAFT].map(std::path::Path::new);
        let pair = Pair::load(paths[0], paths[1], &options).expect("the micro pair loads");
        let prompts = pair.prompts(&PROMPTS).expect("every byte has a token");
        let engine = pair.engine(&options, &script, Arc::clone(&clock)).expect("it fits");
        let mut driver = Driver::new(engine, clock);
        let asked = |speculation| -> Vec<Asked> {
            let ask = |prompt: &Vec<_>| Asked {
                prompt: prompt.clone(),
                num_tokens: 80,
                temperature,
                speculation,
            };
            prompts.iter().map(ask).collect()
        };
        let plain = driver.run(&asked(Speculation::Off)).expect("it runs");
        let mut shares = Vec::new();
        for &rate in rates {
            script.set_rate(rate);
            let first = driver.next_id().0;
            for (index, plain) in plain.iter().enumerate() {
                let future = [&prompts[index][..], &plain.ids].concat();
                let id = slipstream_model::ids::SequenceId(first + index as u64);
                script.learn(id, future, index as u64);
            }
            let speculative = driver.run(&asked(Speculation::Fixed(3))).expect("it runs");
            let (mut num_proposed, mut num_accepted) = (0, 0);
            for (plain, speculative) in plain.iter().zip(&speculative) {
                assert_eq!(plain.ids, speculative.ids, "rate {rate}");
                num_proposed += speculative.finished.speculation.num_proposed;
                num_accepted += speculative.finished.speculation.num_accepted();
            }
            assert!(num_proposed > 100, "rate {rate}: {num_proposed} proposed");
            shares.push(num_accepted as f64 / num_proposed as f64);
        }
        shares
    }

    #[test]
    fn a_draft_agrees_as_often_as_it_is_told() {
        for temperature in [0.0, 0.8] {
            let shares = acceptance(temperature, &[0.0, 0.5, 0.7, 1.0]);
            assert_eq!((shares[0], shares[3]), (0.0, 1.0), "T {temperature}: {shares:?}");
            // Accepted of three: (r + r^2 + r^3) / 3.
            for (share, rate) in shares[1..3].iter().zip([0.5_f64, 0.7]) {
                let expected = (rate + rate.powi(2) + rate.powi(3)) / 3.0;
                let difference = (share - expected).abs();
                assert!(difference < 0.1, "T {temperature}, rate {rate}: {share}, not {expected}");
            }
        }
    }
}
