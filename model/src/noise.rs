//! Owns the noise that draft and verifier share: for every (seed, sample index, absolute position,
//! token) a fixed standard Gumbel number. Knows no logits. Its known-answer vectors are frozen in
//! `tests/noise.rs`; a change here changes every sampled response and raises `NUMERICS_VERSION`.
//!
//! Adding it to log-probabilities and taking the argmax samples from them exactly (the Gumbel-max
//! identity), and sharing it couples draft and verifier without communication: Daliri, Musco,
//! Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
//! arXiv 2408.07978.

use crate::ids::TokenId;
use crate::math;

/// Separates this use of blake3 from every other; part of the frozen definition.
const KEY_CONTEXT: &str = "slipstream noise row key v1";

/// Slightly more than ln 2, so that bounds computed with it hold after rounding.
const LN2_ABOVE: f64 = std::f64::consts::LN_2 * (1.0 + 1e-9);

/// What one token more adds before the finaliser.
pub(crate) const TOKEN_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser's factors.
pub(crate) const MIXERS: [u64; 2] = [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];

/// Bits that a Gumbel number is made of.
const LEADING_ONES_MAX: u32 = 53;

/// The noise of one row: all tokens at one absolute position of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseRow {
    key: [u64; 2],
}

/// One token's 53 bits of noise, from which the Gumbel number or a cheap bound can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseBits(u64);

impl NoiseRow {
    /// The row of `position`, the absolute position of the token to be chosen. The key is a strong
    /// 128-bit mix (blake3) of all three numbers: rows never share noise by accident.
    #[must_use]
    pub fn new(seed: u64, sample_index: u32, position: usize) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(&sample_index.to_le_bytes());
        hasher.update(&(position as u64).to_le_bytes());
        let mut key = [0u8; 16];
        hasher.finalize_xof().fill(&mut key);
        let word = |half: usize| {
            let mut bytes = [0u8; 8];
            bytes.copy_from_slice(&key[half * 8..half * 8 + 8]);
            u64::from_le_bytes(bytes)
        };
        Self { key: [word(0), word(1)] }
    }

    /// The noise of one token: a keyed 64-bit finaliser in the manner of SplitMix64 (Steele, Lea,
    /// Flood, OOPSLA 2014), of which the high 53 bits are kept. For a fixed row it is a bijection
    /// of the token before truncation.
    #[must_use]
    pub fn bits(&self, token: TokenId) -> NoiseBits {
        NoiseBits(self.hash(u64::from(token.0)) >> 11)
    }

    /// All 64 bits of the finaliser, of which [`bits`](Self::bits) keeps the high 53.
    #[inline]
    pub(crate) fn hash(&self, token: u64) -> u64 {
        let mut h = self.key[0].wrapping_add(token.wrapping_mul(TOKEN_STEP));
        h = (h ^ (h >> 30)).wrapping_mul(MIXERS[0]) ^ self.key[1];
        h = (h ^ (h >> 27)).wrapping_mul(MIXERS[1]);
        h ^ (h >> 31)
    }

    /// The key, for kernels that compute several [hashes](Self::hash) side by side.
    pub(crate) fn key(&self) -> [u64; 2] {
        self.key
    }

    /// `G = -ln(-ln(u))`, standard Gumbel, with `u = (bits + 0.5) * 2^-53`.
    #[must_use]
    pub fn gumbel(&self, token: TokenId) -> f64 {
        self.bits(token).gumbel()
    }
}

impl NoiseBits {
    /// The noise of the given 53 bits; higher bits are ignored. For tests of the extremes.
    #[must_use]
    pub fn from_raw(bits: u64) -> Self {
        Self(bits & ((1 << 53) - 1))
    }

    /// The 53 bits.
    #[must_use]
    pub fn raw(self) -> u64 {
        self.0
    }

    /// `-ln(-ln(u))`. For `u` near 1 the complement `1 - u` is used, which `f64` holds exactly:
    /// `u` itself would round, to 1 at the very end, and clip the tail that rare tokens need.
    #[must_use]
    pub fn gumbel(self) -> f64 {
        const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
        let complement = ((1u64 << 53) - self.0) as f64 - 0.5;
        let exponential = if self.0 >= 3 << 51 {
            math::neg_ln_one_minus(complement * SCALE)
        } else {
            -math::ln((self.0 as f64 + 0.5) * SCALE)
        };
        -math::ln(exponential)
    }

    /// An upper bound of [`gumbel`](Self::gumbel) from the leading one bits alone, without a
    /// logarithm: with z of them, `1 - u > 2^-(z+1)` and `G < -ln(1 - u) < (z + 1) ln 2`.
    #[must_use]
    pub fn gumbel_bound(self) -> f64 {
        let leading_ones = (self.0 << 11).leading_ones().min(LEADING_ONES_MAX);
        f64::from(leading_ones + 1) * LN2_ABOVE
    }
}

/// The smallest hash with which a token may still win: a token whose score without noise is at most
/// `base`, and whose [hash](NoiseRow::hash) is smaller, stays below `best` with its noise. `None`
/// when no noise is large enough.
pub(crate) fn hash_to_reach(best: f64, base: f64) -> Option<u64> {
    // An estimate of the leading ones it takes, then the bound's own arithmetic: with fewer than
    // `ones` of them the noise is at most `ones * LN2_ABOVE`.
    let mut ones = (((best - base) / LN2_ABOVE) as u32).min(LEADING_ONES_MAX + 1);
    while ones > 0 && base + f64::from(ones) * LN2_ABOVE >= best {
        ones -= 1;
    }
    (ones <= LEADING_ONES_MAX).then(|| !(u64::MAX >> ones))
}
