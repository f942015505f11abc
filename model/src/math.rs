//! Owns the natural logarithm and exponential of `f64` that token choice uses. They are ours
//! because a platform's libm may round differently, and a different last bit may be a different
//! token. Only `+ - * /` are used: IEEE 754 fixes their results, so every machine agrees.
//! The `f32` exponential of the network lives with the kernels.

/// High part of ln 2: its low 32 bits are zero, so that `k * LN2_HI` is exact for `|k| < 2^20`.
const LN2_HI: f64 = f64::from_bits(0x3FE6_2E42_FEE0_0000);
/// ln 2 - `LN2_HI`, rounded.
const LN2_LO: f64 = f64::from_bits(0x3DEA_39EF_3579_3C76);
/// Below this [`exp`] returns 0: the result would be subnormal.
const EXP_MIN: f64 = -708.0;
/// Above this [`exp`] returns infinity.
const EXP_MAX: f64 = 709.0;

/// `2 * atanh(s)` for `|s| <= 0.172`, by its odd Taylor series to `s^23`; the first dropped term
/// is below `2^-59` of the result.
fn twice_atanh(s: f64) -> f64 {
    let z = s * s;
    let mut sum = 1.0 / 23.0;
    for n in (1..=10).rev() {
        sum = sum * z + 1.0 / f64::from(2 * n + 1);
    }
    2.0 * (s * z * sum + s)
}

/// Natural logarithm, within 2 ulp for positive normal numbers. `ln(0) = -inf`; negative numbers
/// and NaN give NaN; subnormal numbers are treated as 0.
#[must_use]
pub fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x < f64::MIN_POSITIVE {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i32) - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000F_FFFF_FFFF_FFFF) | 0x3FF0_0000_0000_0000);
    // Centre the mantissa on 1, so that the series converges fast: [sqrt(1/2), sqrt(2)).
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let k = f64::from(exponent);
    let series = twice_atanh((mantissa - 1.0) / (mantissa + 1.0));
    k * LN2_HI + (series + k * LN2_LO)
}

/// `-ln(1 - w)` for `0 <= w <= 0.25`, accurate however small `w` is.
#[must_use]
pub fn neg_ln_one_minus(w: f64) -> f64 {
    debug_assert!((0.0..=0.25).contains(&w), "w = {w} lies outside the series' range");
    twice_atanh(w / (2.0 - w))
}

/// Natural exponential, within 2 ulp; 0 below -708, infinity above 709, NaN for NaN.
#[must_use]
pub fn exp(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x < EXP_MIN {
        return 0.0;
    }
    if x > EXP_MAX {
        return f64::INFINITY;
    }
    let k = (x * std::f64::consts::LOG2_E).round_ties_even();
    let r = (x - k * LN2_HI) - k * LN2_LO;
    // Taylor series to r^14 by Horner's rule, |r| <= 0.35.
    let mut sum = 1.0;
    for n in (1..=14).rev() {
        sum = sum * r / f64::from(n) + 1.0;
    }
    let exponent = (k as i64 + 1023) as u64;
    sum * f64::from_bits(exponent << 52)
}

/// [`exp`] without branches, so that the compiler may compute several side by side: the same bits.
#[inline(always)]
pub(crate) fn exp_branchless(x: f64) -> f64 {
    /// Added to a whole number, it leaves it in the low bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    let inside = if x > EXP_MIN { x } else { EXP_MIN };
    let inside = if inside < EXP_MAX { inside } else { EXP_MAX };
    let shifted = inside * std::f64::consts::LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = (inside - k * LN2_HI) - k * LN2_LO;
    let mut sum = 1.0;
    let mut n = 14.0;
    while n > 0.5 {
        sum = sum * r / n + 1.0;
        n -= 1.0;
    }
    let exponent = shifted.to_bits().wrapping_add(1023);
    let result = sum * f64::from_bits(exponent << 52);
    let result = if x < EXP_MIN { 0.0 } else { result };
    let result = if x > EXP_MAX { f64::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "ours are held against the platform's")]
mod tests {
    use super::{exp, exp_branchless, ln, neg_ln_one_minus};

    fn ulps(a: f64, b: f64) -> u64 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn logarithm_and_exponential_are_close_to_the_platform() {
        let mut x = 1e-300;
        while x < 1e300 {
            assert!(ulps(ln(x), x.ln()) <= 4 || (ln(x) - x.ln()).abs() < 1e-16, "ln({x})");
            x *= 1.37;
        }
        let mut x = -700.0;
        while x < 700.0 {
            assert!(ulps(exp(x), x.exp()) <= 4, "exp({x}): {} {}", exp(x), x.exp());
            x += 0.317;
        }
    }

    #[test]
    fn small_complements_keep_their_precision() {
        for power in 2..60 {
            let w = (-f64::from(power)).exp2();
            assert!(ulps(neg_ln_one_minus(w), -(-w).ln_1p()) <= 4, "w = 2^-{power}");
        }
    }

    #[test]
    fn the_branchless_exponential_has_the_same_bits() {
        let mut x = -760.0;
        while x < 760.0 {
            for x in [x, x * 1e-3, x * 1e-9, x * 1e-300] {
                assert_eq!(exp_branchless(x).to_bits(), exp(x).to_bits(), "exp({x})");
            }
            x += 0.000_917;
        }
        let halves = (-2044..2045).map(|n| f64::from(n) * std::f64::consts::LN_2 / 2.0);
        let edges = [-708.0, 709.0, 0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
        for x in halves.chain(edges).flat_map(|x| [x.next_down(), x, x.next_up()]) {
            assert_eq!(exp_branchless(x).to_bits(), exp(x).to_bits(), "exp({x})");
        }
    }

    #[test]
    fn edges_are_defined() {
        assert_eq!(ln(0.0), f64::NEG_INFINITY);
        assert_eq!(ln(1.0), 0.0);
        assert!(ln(-1.0).is_nan() && ln(f64::NAN).is_nan() && exp(f64::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(f64::INFINITY), f64::INFINITY);
    }
}
