//! Proves the scans of whole rows of logits, on every implementation that this CPU has: maxima of
//! blocks, hits of noise and sums of exponentials equal what looking at every token gives, bit for
//! bit, and the estimated sum is as close as it says.

use slipstream_model::ids::TokenId;
use slipstream_model::kernels::Isa;
use slipstream_model::kernels::scan::{
    SCAN_LEN, block_maxima, estimate_exp_sum, exp_sum, noise_hits, num_blocks,
};
use slipstream_model::math;
use slipstream_model::noise::NoiseRow;
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

/// A row with numbers of all sizes; one in `odd_in` is odd (0: none).
fn row(rng: &mut Rng, len: usize, odd_in: usize) -> Vec<f32> {
    let scale = *rng.pick(&[1.0, 10.0, 300.0, 1e30, 1e-42]);
    let odd = [0.0, -0.0, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-40];
    let mut one = || {
        if rng.one_in(odd_in) { *rng.pick(&odd) } else { ((rng.unit() - 0.5) * scale) as f32 }
    };
    (0..len).map(|_| one()).collect()
}

/// Lengths at and around the edges of blocks, then random ones.
fn lens(rng: &mut Rng) -> Vec<usize> {
    let mut lens: Vec<usize> = (1..=2 * SCAN_LEN + 1).collect();
    lens.extend((0..200).map(|_| rng.between(1, 3_000)));
    lens
}

#[test]
fn maxima_are_the_largest_and_unsound_rows_are_seen() {
    let mut rng = Rng::new(1);
    for len in lens(&mut rng) {
        let odd_in = *rng.pick(&[0, 2, 20]);
        let logits = row(&mut rng, len, odd_in);
        let largest = |block: &[f32]| block.iter().copied().fold(f32::NEG_INFINITY, f32::max) + 0.0;
        let wanted: Vec<u32> =
            logits.chunks(SCAN_LEN).map(|block| largest(block).to_bits()).collect();
        for isa in Isa::available() {
            let mut maxima = vec![f32::NAN; num_blocks(len)];
            assert!(block_maxima(isa, &logits, &mut maxima), "{} {len}", isa.name());
            let found: Vec<u32> = maxima.iter().map(|maximum| maximum.to_bits()).collect();
            assert_eq!(found, wanted, "{} on {len} logits", isa.name());
            for at in [0, len - 1, rng.below(len)] {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                    let mut logits = logits.clone();
                    logits[at] = bad;
                    let is_sound = block_maxima(isa, &logits, &mut maxima);
                    assert!(!is_sound, "{}: {bad} at {at} of {len}", isa.name());
                }
            }
        }
    }
}

#[test]
fn noise_hits_are_those_of_every_token() {
    let mut rng = Rng::new(2);
    for _ in 0..2_000 {
        let noise = NoiseRow::new(rng.bits(), 0, rng.below(5_000));
        let first = TokenId(rng.below(200_000) as u32);
        // Only the high 53 bits of a hash are public, so the limits are whole numbers of them.
        let ones = rng.below(8) as u32;
        let random = rng.bits() >> 11;
        let limit = *rng.pick(&[0, (!(u64::MAX >> ones)) >> 11, random, (1 << 53) - 1]);
        let is_hit = |offset: u32| noise.bits(TokenId(first.0 + offset)).raw() >= limit;
        let wanted = (0..SCAN_LEN as u32)
            .fold(0, |hits, offset| hits | (u32::from(is_hit(offset)) << offset));
        for isa in Isa::available() {
            assert_eq!(noise_hits(isa, &noise, first, limit << 11), wanted, "{}", isa.name());
        }
    }
}

#[test]
fn sums_of_exponentials_are_in_order_and_estimates_close() {
    timed("scans, sums", 5.0, || {
        let mut rng = Rng::new(3);
        for len in lens(&mut rng) {
            let logits: Vec<f32> = row(&mut rng, len, 20);
            let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let in_order = |scale: f64, max: f64| {
                let terms = logits.iter().map(|&logit| math::exp(f64::from(logit) * scale - max));
                terms.fold(0.0, |sum, term| sum + term)
            };
            let scale = *rng.pick(&[1.0, 1.25, 0.01, 50.0]);
            for isa in Isa::available() {
                let found = exp_sum(isa, &logits, max);
                assert_eq!(found.to_bits(), in_order(1.0, max).to_bits(), "{}", isa.name());
                let scaled_max = max * scale;
                if scaled_max.abs() > 1e5 {
                    continue;
                }
                let found = estimate_exp_sum(isa, &logits, scale, scaled_max);
                let wanted = in_order(scale, scaled_max);
                let error = (found / wanted - 1.0).abs();
                assert!(error < 1e-10, "{} on {len} logits: {found} {wanted}", isa.name());
                let plain = estimate_exp_sum(Isa::Plain, &logits, scale, scaled_max);
                assert_eq!(found.to_bits(), plain.to_bits(), "{} on {len} logits", isa.name());
            }
        }
    });
}
