//! Owns what of a sequence's KV is kept for others and when: prompts as soon as they are computed,
//! output when the sequence gives its blocks back. Only computed positions of committed tokens ever
//! count. Knows no policy of eviction.

use slipstream_model::ids::BLOCK_LEN;

use super::EngineConfig;
use super::block_pool::BlockPool;
use super::prefix_cache::Contents;
use super::request::PrefixReuse;
use super::sequence::Sequence;

/// Whether a sequence uses and feeds the prefix cache.
pub(super) fn may_share(config: &EngineConfig, sequence: &Sequence) -> bool {
    config.prefix_reuse && sequence.request.prefix_reuse != PrefixReuse::Off
}

/// Makes sure that the keys of all full blocks of known tokens are there.
pub(super) fn learn_keys(blocks: &BlockPool, sequence: &mut Sequence) {
    let scope = sequence.request.scope();
    blocks.extend_keys(scope, &sequence.tokens, &mut sequence.block_keys);
}

/// Keeps what is computed of a sequence's prompt and was not kept before.
pub(super) fn remember_prompt(
    config: &EngineConfig,
    blocks: &mut BlockPool,
    sequence: &mut Sequence,
) {
    let len = sequence.computed_len.min(sequence.request.prompt.len());
    if sequence.num_remembered < len / BLOCK_LEN && may_share(config, sequence) {
        remember(blocks, sequence, len / BLOCK_LEN);
    }
}

/// Keeps the first `num_blocks` blocks of a sequence, whose keys are known.
fn remember(blocks: &mut BlockPool, sequence: &mut Sequence, num_blocks: usize) {
    let contents = Contents {
        scope: sequence.request.scope(),
        tokens: &sequence.tokens,
        keys: &sequence.block_keys[..num_blocks],
    };
    let from = sequence.num_remembered;
    sequence.num_remembered = blocks.remember(&mut sequence.blocks, from, contents);
}

/// Takes the blocks of a sequence back and keeps what they hold for whoever needs it next.
pub(super) fn give_back(config: &EngineConfig, blocks: &mut BlockPool, sequence: &mut Sequence) {
    // An end inside an accepted run leaves computed positions behind the last committed token.
    let num_blocks = sequence.computed_len.min(sequence.tokens.len()) / BLOCK_LEN;
    if num_blocks > sequence.num_remembered && may_share(config, sequence) {
        learn_keys(blocks, sequence);
        remember(blocks, sequence, num_blocks);
    }
    blocks.release(&mut sequence.blocks);
    sequence.computed_len = 0;
    sequence.num_remembered = 0;
    sequence.is_pinned = false;
}
