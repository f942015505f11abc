//! Owns the plain twins: what every kernel computes, written so that the order of operations can
//! be read. They define the bits; the reference decoder runs on them. Knows nothing of the CPU.
//!
//! `f32::mul_add` is the fused operation with one rounding, on every machine. Nothing here may be
//! rearranged without raising [`NUMERICS_VERSION`](super::NUMERICS_VERSION).

mod attention;
pub(super) mod products;

pub(super) use attention::narrow_one;

use super::Kernels;

pub(super) static KERNELS: Kernels = Kernels {
    product_f32: products::floats,
    product_f16: products::floats,
    product_bf16: products::floats,
    product_q8_0: products::quants,
    product_q4_0: products::quants,
    quantise: products::quantise,
    rms_norm,
    swiglu,
    attention: &attention::KERNELS,
    exp: |values| values.iter_mut().for_each(|value| *value = exp(*value)),
    scan: &super::scan::PLAIN,
    peak: None,
};

/// The fixed tree: how 8 lanes become one number.
pub(super) fn tree(lanes: [f32; 8]) -> f32 {
    let [l0, l1, l2, l3, l4, l5, l6, l7] = lanes;
    ((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7))
}

/// Dot product in 8 lanes, lane = index % 8.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane = a.mul_add(b, *lane);
        }
    }
    tree(lanes)
}

/// `1 / sqrt(mean square + eps)`.
pub(super) fn norm_scale(sum_of_squares: f32, len: usize, eps: f32) -> f32 {
    1.0 / (sum_of_squares / len as f32 + eps).sqrt()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = norm_scale(dot(x, x), x.len(), eps);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (x * scale) * weight;
    }
}

/// `x / (1 + exp(-x)) * up`.
pub(super) fn swiglu_one(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(-gate)) * up
}

fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, &up) in gate.iter_mut().zip(up) {
        *gate = swiglu_one(*gate, up);
    }
}

/// Where [`exp`] stops looking at its argument: above, the result is infinite.
pub(super) const EXP_MAX: f32 = 89.0;
/// Below, the result rounds to zero: `exp(-104)` is less than half the smallest subnormal.
pub(super) const EXP_MIN: f32 = -104.0;
/// ln 2 rounded to f32. `k * LN2_HI` is used fused and its remainder is exact.
pub(super) const LN2_HI: f32 = std::f32::consts::LN_2;
/// ln 2 - `LN2_HI`, rounded.
pub(super) const LN2_LO: f32 = -1.904_654_3e-9;
/// `1 / n!` for n = 7 down to 0: the Taylor series of exp. For `|r| <= ln(2) / 2` the first
/// dropped term is below 0.1 ulp.
pub(super) const EXP_SERIES: [f32; 8] =
    [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// Natural exponential by reduction to `|r| <= ln(2) / 2` in two steps (Cody and Waite, Software
/// Manual for the Elementary Functions, 1980, chapter 6) and a polynomial. The power of two is
/// applied in two factors, so that results below the normal range come out rounded, not wrong.
pub(super) fn exp(x: f32) -> f32 {
    // Written so that NaN passes through.
    let x = if EXP_MAX < x { EXP_MAX } else { x };
    let x = if EXP_MIN > x { EXP_MIN } else { x };
    let k = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = (-k).mul_add(LN2_HI, x);
    let r = (-k).mul_add(LN2_LO, r);
    let mut series = EXP_SERIES[0];
    for &coefficient in &EXP_SERIES[1..] {
        series = series.mul_add(r, coefficient);
    }
    let k = k as i32;
    let half = k >> 1;
    series * power_of_two(half) * power_of_two(k - half)
}

/// `2^k` for `-126 <= k <= 127`.
fn power_of_two(k: i32) -> f32 {
    f32::from_bits(((k + 127) as u32) << 23)
}
