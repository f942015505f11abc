//! Owns the randomness of the tests: seeded, so that every world can be replayed. Knows nothing of
//! what is drawn with it.

/// The SplitMix64 finaliser: a bijection of 64 bits that mixes well.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A seeded generator. Cheap to fork, so that one stream's draws do not shift another's.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The generator of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: mix(seed ^ 0x534C_4950) }
    }

    /// An independent generator for a named purpose.
    #[must_use]
    pub fn fork(&self, purpose: u64) -> Self {
        Self { state: mix(self.state ^ mix(purpose)) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.state)
    }

    /// A number in `0 .. end`; 0 when `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.bits() % end as u64) as usize }
    }

    /// A number in `low ..= high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high + 1 - low)
    }

    /// A number in `0 ..= max` with a heavy tail: at least `n` once in `n` draws.
    pub fn heavy(&mut self, max: usize) -> usize {
        let size = 1.0 / self.unit().max(f64::MIN_POSITIVE);
        (size as usize).min(max)
    }

    /// True once in `n` draws; never when `n` is 0.
    pub fn one_in(&mut self, n: usize) -> bool {
        n != 0 && self.below(n) == 0
    }

    /// A number in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of `items`.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}
