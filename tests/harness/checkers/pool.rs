//! Owns what must be true of the verifier's KV blocks: every one is free, held by tables or kept by
//! the prefix cache; what is kept holds what it says; what two hold is written by nobody.

use std::collections::BTreeMap;

use slipstream_model::ids::{BLOCK_LEN, BlockId};
use slipstream_server::engine::{Engine, Phase};

use super::{Checker, both, claim};

/// What was found in the cached blocks before, so that only changes are looked at again.
#[derive(Default)]
pub(super) struct CachedContents {
    checked: BTreeMap<BlockId, Content>,
}

/// A cached block that held what it said.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Content {
    /// The store's version of the block.
    version: u64,
    /// A hash of scope and tokens.
    said: u64,
}

impl Checker {
    /// I1: every block is free, held or cached, and as often held as tables hold it.
    pub(super) fn blocks_are_accounted_for(&self, engine: &Engine) -> Result<(), String> {
        let blocks = engine.blocks();
        let mut refs: Vec<usize> = vec![0; blocks.num_blocks()];
        for view in engine.sequences() {
            for block in view.blocks {
                refs[block.index()] += 1;
            }
            claim(view.phase == Phase::Running || view.blocks.is_empty(), || {
                format!("I1: sequence {} in {:?} holds blocks", view.id, view.phase)
            })?;
            let known = self.known.get(&view.id);
            let is_private = known.is_some_and(|known| known.is_private);
            let is_alone = known.is_some_and(|known| !known.has_followers);
            let is_shared =
                |block: &BlockId| blocks.is_kept(*block) || (is_alone && blocks.refs(*block) > 1);
            claim(!is_private || !view.blocks.iter().any(is_shared), || {
                format!("I10: {} shares KV although it must not", view.id)
            })?;
        }
        let (mut num_free, mut num_held, mut num_cached) = (0, 0, 0);
        for (index, &refs) in refs.iter().enumerate() {
            let block = BlockId(u32::try_from(index).unwrap());
            claim(blocks.refs(block) == refs, || {
                format!("I1: {block:?} is held {refs} times, counted {}", blocks.refs(block))
            })?;
            let is_kept = blocks.is_kept(block);
            num_held += usize::from(refs > 0);
            num_cached += usize::from(refs == 0 && is_kept);
            num_free += usize::from(refs == 0 && !is_kept);
        }
        let is_whole = (num_free, num_cached) == (blocks.num_free(), blocks.num_cached())
            && num_free + num_held + num_cached == blocks.num_blocks();
        claim(is_whole, || {
            format!(
                "I1: {num_free} free, {num_held} held, {num_cached} cached of {}; counted {}, {}",
                blocks.num_blocks(),
                blocks.num_free(),
                blocks.num_cached()
            )
        })
    }

    /// I2: whatever the cache offers was computed from exactly the tokens and the scope it is
    /// offered for. And what the last step wrote, nobody else holds.
    pub(super) fn cached_blocks_hold_what_they_say(
        &mut self,
        engine: &Engine,
    ) -> Result<(), String> {
        for (block, scope, tokens) in engine.blocks().cached_prefixes() {
            claim(engine.blocks().is_kept(block), || format!("I1: {block:?} is not cached"))?;
            claim(!tokens.is_empty() && tokens.len().is_multiple_of(BLOCK_LEN), || {
                format!("I2: {block:?} is cached with {} tokens", tokens.len())
            })?;
            let scope = scope.tag();
            let mix = |said: u64, token: u32| {
                (said.rotate_left(5) ^ u64::from(token)).wrapping_mul(0x517C_C1B7_2722_0A95)
            };
            let said = tokens.iter().fold(scope, |said, token| mix(said, token.0));
            let content = Content { version: self.verifier.version(block), said };
            if self.cached.checked.insert(block, content) == Some(content) {
                continue;
            }
            let states = self.lm.states(scope, &tokens);
            let last = &states[tokens.len() - BLOCK_LEN..];
            let wrong = self.verifier.first_wrong_slot(&[block], last);
            claim(wrong.is_none(), || {
                format!("I2: cached {block:?} does not hold {tokens:?}: {wrong:?}")
            })?;
        }
        self.written_blocks_are_ones_own(engine)
    }

    /// What two tables hold is written by neither: whoever held a block before the step and holds
    /// it still was the one to write it.
    fn written_blocks_are_ones_own(&self, engine: &Engine) -> Result<(), String> {
        if self.verifier.counts().calls == self.before.verifier.calls {
            return Ok(()); // the last pass was another step's
        }
        let mut shared = None;
        for (before, view) in both(&self.before, engine) {
            let held = &self.before.blocks[before.blocks.0..before.blocks.1];
            self.verifier.last_writers(view.blocks.iter().copied(), |block, writer| {
                if writer != view.id.0 && held.contains(&block) {
                    shared = Some((block, writer, view.id));
                }
            });
        }
        claim(shared.is_none(), || format!("I2: block, writer and other holder: {shared:?}"))
    }
}
