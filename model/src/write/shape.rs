//! Owns how large a grown network is: what was asked for, what the source must keep, and the choice
//! of a shape for a number of weights. Knows no weights.

use crate::config::LlamaConfig;
use crate::load::limits::{MAX_FFN_LEN, MAX_HEADS, MAX_HIDDEN_LEN, MAX_LAYERS};
use crate::load::{Role, slots};
use crate::weights::Q8_0_BLOCK_LEN;

/// Hidden sizes are multiplied by these: norms are then rescaled by powers of two, exactly.
pub const HIDDEN_FACTORS: [usize; 3] = [1, 4, 16];
/// Width of the feed-forward part beside the hidden size, where a size is chosen: 2.75, as
/// published networks have it.
const FFN_PER_HIDDEN: (usize, usize) = (11, 4);

/// Why a network cannot be grown as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// The hidden size can only be multiplied by powers of four.
    #[error("the hidden size cannot be multiplied by {0}; by 1, 4 or 16 it can")]
    Factor(usize),
    /// Growing takes nothing away.
    #[error("{what} cannot shrink from {source_len} to {given}")]
    Smaller {
        /// What is counted.
        what: &'static str,
        /// What was asked for.
        given: usize,
        /// What the source has.
        source_len: usize,
    },
    /// Larger than any model that is loaded.
    #[error("{given} {what} are more than the {limit} that can be loaded")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// What was asked for.
        given: usize,
        /// The largest that loads.
        limit: usize,
    },
    /// A part of the network that would have to end inside a block of weights with one scale.
    #[error("{what} is {given}; in blocks of 32 weights it must be a multiple of {multiple}")]
    Block {
        /// What is counted.
        what: &'static str,
        /// Its length.
        given: usize,
        /// What it must be a multiple of.
        multiple: usize,
    },
    /// Query heads are shared out among the key/value heads.
    #[error(
        "{heads} heads over {kv_heads} key/value heads are no whole groups of at least the \
         source's {group_len}"
    )]
    Groups {
        /// Query heads asked for.
        heads: usize,
        /// Key/value heads asked for.
        kv_heads: usize,
        /// Query heads per key/value head of the source.
        group_len: usize,
    },
    /// The source was not loaded as Q8_0.
    #[error("tensor `{0}` was not loaded as Q8_0, which is what is written")]
    Format(String),
    /// No shape has about as many weights.
    #[error("no network grown from {source_weights} weights has about {target}")]
    NoShape {
        /// Weights asked for.
        target: u64,
        /// Weights of the source.
        source_weights: u64,
    },
}

/// What to grow to. `None` keeps what the source has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// One of [`HIDDEN_FACTORS`].
    pub hidden_factor: usize,
    /// Layers.
    pub num_layers: Option<usize>,
    /// Width of the feed-forward network.
    pub ffn_len: Option<usize>,
    /// Query heads.
    pub num_heads: Option<usize>,
    /// Key and value heads.
    pub num_kv_heads: Option<usize>,
}

impl Growth {
    /// No growth.
    pub const NONE: Self = Self {
        hidden_factor: 1,
        num_layers: None,
        ffn_len: None,
        num_heads: None,
        num_kv_heads: None,
    };

    /// The growth to about `target` weights with layers of usual proportions: heads as wide as the
    /// hidden size together, a feed-forward part of 2.75 times that, and of the hidden sizes
    /// possible the largest.
    ///
    /// # Errors
    /// [`GrowError::NoShape`] when none comes within a tenth.
    pub fn to_size(source: &LlamaConfig, is_tied: bool, target: u64) -> Result<Self, GrowError> {
        let shapes = HIDDEN_FACTORS.iter().rev().map(|&factor| {
            let hidden_len = source.hidden_len * factor;
            let ffn_len = hidden_len * FFN_PER_HIDDEN.0 / FFN_PER_HIDDEN.1;
            let kv_factor = factor.isqrt();
            let mut growth = Self {
                hidden_factor: factor,
                num_layers: Some(source.num_layers),
                ffn_len: Some(ffn_len.next_multiple_of(Q8_0_BLOCK_LEN).max(source.ffn_len)),
                num_heads: Some(source.num_heads * factor),
                num_kv_heads: Some(source.num_kv_heads * kv_factor),
            };
            let smallest = num_weights(&growth.unchecked(source), is_tied);
            growth.num_layers = Some(source.num_layers + 1);
            let layer = num_weights(&growth.unchecked(source), is_tied) - smallest;
            let more = (target.saturating_sub(smallest) + layer / 2) / layer;
            // One layer past the limit is refused as well as any number of them.
            let more = more.min(MAX_LAYERS as u64) as usize;
            growth.num_layers = Some(source.num_layers + more);
            growth
        });
        let is_close = |growth: &Self| {
            let size = num_weights(&growth.unchecked(source), is_tied);
            size.abs_diff(target) <= target / 10 && growth.apply(source).is_ok()
        };
        let source_weights = num_weights(source, is_tied);
        shapes.into_iter().find(is_close).ok_or(GrowError::NoShape { target, source_weights })
    }

    /// The architecture of the grown network.
    ///
    /// # Errors
    /// [`GrowError`] names what cannot be.
    pub fn apply(&self, source: &LlamaConfig) -> Result<LlamaConfig, GrowError> {
        if !HIDDEN_FACTORS.contains(&self.hidden_factor) {
            return Err(GrowError::Factor(self.hidden_factor));
        }
        let grown = self.unchecked(source);
        for (what, given, source_len, limit) in [
            ("the hidden size", grown.hidden_len, source.hidden_len, MAX_HIDDEN_LEN),
            ("layers", grown.num_layers, source.num_layers, MAX_LAYERS),
            ("the feed-forward width", grown.ffn_len, source.ffn_len, MAX_FFN_LEN),
            ("heads", grown.num_heads, source.num_heads, MAX_HEADS),
            ("key/value heads", grown.num_kv_heads, source.num_kv_heads, MAX_HEADS),
        ] {
            if given < source_len {
                return Err(GrowError::Smaller { what, given, source_len });
            }
            if given > limit {
                return Err(GrowError::TooLarge { what, given, limit });
            }
        }
        check_groups(source, &grown)?;
        check_blocks(source)?;
        check_blocks(&grown)?;
        Ok(grown)
    }

    fn unchecked(&self, source: &LlamaConfig) -> LlamaConfig {
        let factor = self.hidden_factor;
        LlamaConfig {
            hidden_len: source.hidden_len.saturating_mul(factor),
            num_layers: self.num_layers.unwrap_or(source.num_layers),
            ffn_len: self.ffn_len.unwrap_or(source.ffn_len),
            num_heads: self.num_heads.unwrap_or(source.num_heads),
            num_kv_heads: self.num_kv_heads.unwrap_or(source.num_kv_heads),
            // The mean square shrinks by the factor.
            norm_eps: source.norm_eps / factor as f32,
            ..source.clone()
        }
    }
}

/// Numbers of a network altogether.
#[must_use]
pub fn num_weights(config: &LlamaConfig, is_tied: bool) -> u64 {
    let len = |(role, _): (Role, usize)| {
        role.shape(config).iter().map(|dim| *dim as u64).product::<u64>()
    };
    slots(config, !is_tied).map(len).sum()
}

/// A source's query head must find its key/value head, beside others of its group.
fn check_groups(source: &LlamaConfig, grown: &LlamaConfig) -> Result<(), GrowError> {
    let (heads, kv_heads) = (grown.num_heads, grown.num_kv_heads);
    let group_len = source.group_len();
    if !heads.is_multiple_of(kv_heads) || heads / kv_heads < group_len {
        return Err(GrowError::Groups { heads, kv_heads, group_len });
    }
    let is_split = heads / kv_heads > group_len;
    if is_split && !source.head_dim.is_multiple_of(Q8_0_BLOCK_LEN) {
        // Other heads come between the source's, and a block may not hold both.
        let (what, given) = ("the width of a head", source.head_dim);
        return Err(GrowError::Block { what, given, multiple: Q8_0_BLOCK_LEN });
    }
    Ok(())
}

/// Inputs of products are whole blocks, so that what is new never shares a scale with what is old.
fn check_blocks(config: &LlamaConfig) -> Result<(), GrowError> {
    for (what, given) in [
        ("the hidden size", config.hidden_len),
        ("the feed-forward width", config.ffn_len),
        ("the width of all heads", config.query_len()),
    ] {
        if !given.is_multiple_of(Q8_0_BLOCK_LEN) {
            return Err(GrowError::Block { what, given, multiple: Q8_0_BLOCK_LEN });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{GrowError, Growth, num_weights};
    use crate::config::{LlamaConfig, RopeScaling};

    /// The shape of the embedded verifier.
    fn source() -> LlamaConfig {
        LlamaConfig {
            vocab_size: 4096,
            hidden_len: 256,
            ffn_len: 704,
            num_layers: 6,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            context_len: 2048,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            rope_freq_divisors: Vec::new(),
            eos_ids: Vec::new(),
        }
    }

    #[test]
    fn sizes_have_usual_shapes() {
        assert_eq!(num_weights(&source(), true), 5_475_584);
        for (target, shape) in [
            (300_000_000, (1024, 26, 2816, 16, 4)),
            (1_100_000_000, (4096, 6, 11_264, 64, 8)),
            (20_000_000, (256, 26, 704, 4, 2)),
        ] {
            let growth = Growth::to_size(&source(), true, target).expect("a possible size");
            let grown = growth.apply(&source()).expect("a possible growth");
            let heads = (grown.num_heads, grown.num_kv_heads);
            let found = (grown.hidden_len, grown.num_layers, grown.ffn_len, heads.0, heads.1);
            assert_eq!(found, shape, "{target}");
            assert!(num_weights(&grown, true).abs_diff(target) < target / 20, "{target}");
        }
        for target in [1_000_000, u64::MAX / 4] {
            let refused = Growth::to_size(&source(), true, target);
            assert!(matches!(refused, Err(GrowError::NoShape { .. })), "{refused:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let none = Growth::NONE;
        let cases = [
            (Growth { hidden_factor: 8, ..none }, GrowError::Factor(8)),
            (
                Growth { num_layers: Some(5), ..none },
                GrowError::Smaller { what: "layers", given: 5, source_len: 6 },
            ),
            (
                Growth { ffn_len: Some(720), ..none },
                GrowError::Block { what: "the feed-forward width", given: 720, multiple: 32 },
            ),
            (
                Growth { num_heads: Some(6), num_kv_heads: Some(4), ..none },
                GrowError::Groups { heads: 6, kv_heads: 4, group_len: 2 },
            ),
            (
                Growth { num_heads: Some(4), num_kv_heads: Some(4), ..none },
                GrowError::Groups { heads: 4, kv_heads: 4, group_len: 2 },
            ),
            (
                Growth { num_layers: Some(2000), ..none },
                GrowError::TooLarge { what: "layers", given: 2000, limit: 1024 },
            ),
        ];
        for (growth, error) in cases {
            assert_eq!(growth.apply(&source()), Err(error), "{growth:?}");
        }
        let narrow = LlamaConfig { head_dim: 16, num_heads: 4, ..source() };
        let split = Growth { num_heads: Some(8), ..none }.apply(&narrow);
        let what = "the width of a head";
        assert_eq!(split, Err(GrowError::Block { what, given: 16, multiple: 32 }));
        let appended = Growth { num_heads: Some(8), num_kv_heads: Some(4), ..none };
        assert!(appended.apply(&narrow).is_ok());
    }
}
