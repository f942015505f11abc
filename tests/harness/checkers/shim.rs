//! Owns stand-ins until the core has landed.
use slipstream_model::block_manager::BlockManager;
use slipstream_model::ids::{BlockId, TokenId};
use slipstream_server::engine::Engine;
use slipstream_server::engine::request::PrefixScope;

pub(super) trait Pool {
    fn num_cached(&self) -> usize;
    fn refs(&self, block: BlockId) -> u32;
    fn is_cached(&self, block: BlockId) -> bool;
    fn is_free(&self, block: BlockId) -> bool;
}
impl Pool for BlockManager {
    fn num_cached(&self) -> usize { 0 }
    fn refs(&self, block: BlockId) -> u32 { u32::from(self.is_held(block)) }
    fn is_cached(&self, _: BlockId) -> bool { false }
    fn is_free(&self, block: BlockId) -> bool { !self.is_held(block) }
}
pub(super) trait Prefixes {
    fn cached_prefixes(&self) -> Vec<(BlockId, PrefixScope, Vec<TokenId>)>;
}
impl Prefixes for Engine {
    fn cached_prefixes(&self) -> Vec<(BlockId, PrefixScope, Vec<TokenId>)> { Vec::new() }
}
pub(crate) const SKELETON: bool = true;
