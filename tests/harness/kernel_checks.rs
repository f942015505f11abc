//! Owns what tests of kernels share: numbers to try them with, and the comparison of every
//! implementation with the plain twin.

use slipstream_model::kernels::Isa;

use crate::random::Rng;

/// Numbers that arithmetic trips over.
pub const ODD: [f32; 10] = [
    0.0,
    -0.0,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    1e-40,
    -1e-30,
];

/// Normal-looking numbers; about one in `odd_in` is odd instead (0: none).
#[must_use]
pub fn floats(rng: &mut Rng, len: usize, odd_in: usize) -> Vec<f32> {
    let mut one = || {
        if rng.one_in(odd_in) {
            return *rng.pick(&ODD);
        }
        let sum = rng.unit() + rng.unit() + rng.unit() - 1.5;
        (sum * 2.0) as f32
    };
    (0..len).map(|_| one()).collect()
}

/// Bytes, half the time only the extremes.
#[must_use]
pub fn bytes(rng: &mut Rng, len: usize) -> Vec<i8> {
    let extreme = rng.one_in(2);
    (0..len)
        .map(|_| if extreme { *rng.pick(&[-128, 127, -127]) } else { rng.bits() as i8 })
        .collect()
}

/// Equality of bits; one NaN is as good as another.
///
/// # Panics
/// When a bit differs.
#[track_caller]
pub fn same_bits(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let same = found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan());
        assert!(same, "{what}: [{index}] is {found:e}, the plain twin has {wanted:e}");
    }
}

/// Runs `kernel` with every implementation and holds it against the plain twin.
///
/// # Panics
/// When a bit differs.
#[track_caller]
pub fn check(what: &str, seed: u64, kernel: impl Fn(Isa) -> Vec<f32>) {
    let wanted = kernel(Isa::Plain);
    for isa in Isa::available() {
        same_bits(&format!("{} {what} (seed {seed})", isa.name()), &kernel(isa), &wanted);
    }
}
