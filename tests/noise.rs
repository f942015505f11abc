//! Proves the shared noise: its bits are frozen for ever, its bound holds at every extreme, its
//! distribution is Gumbel's, and no two rows share it. A change that breaks a vector here changes
//! every sampled response and needs a new numerics version.

use slipstream_model::ids::TokenId;
use slipstream_model::noise::{NoiseBits, NoiseRow};
use slipstream_tests::random::Rng;
use slipstream_tests::stats::{chi_square_limit, pearson};
use slipstream_tests::timing::timed;

/// One frozen answer: seed, sample index, position, token; 53 bits; the Gumbel number's `f64` bits.
type Vector = (u64, u32, usize, u32, u64, u64);

const VECTORS: [Vector; 24] = [
    (0x0, 0x0, 0x0, 0x0, 0x3_DB33_E77D_CD56, 0xBFE7_FC46_B1C9_015A),
    (0x0, 0x0, 0x0, 0x1, 0x11_43DD_2F5B_1CFD, 0x3FDE_E64D_B56A_16BE),
    (0x0, 0x0, 0x0, 0x7CFF, 0x9_4194_3E7F_E4FC, 0xBFCB_948B_E240_9C17),
    (0x0, 0x0, 0x0, 0xFFFFFFFF, 0x1B_F53A_1E54_7C1A, 0x4000_048A_D7E1_3228),
    (0x1, 0x0, 0x0, 0x0, 0x12_56D8_7BBD_379A, 0x3FE2_BE65_4908_626E),
    (0x1, 0x0, 0x0, 0x1, 0x7_0286_2CA0_335D, 0xBFDA_BB17_5089_D2E3),
    (0x1, 0x0, 0x0, 0x7CFF, 0x12_FD3C_AAB4_311D, 0x3FE4_CFA2_9342_E2BE),
    (0x1, 0x0, 0x0, 0xFFFFFFFF, 0x1D_B5D4_3A15_391E, 0x4004_CDA3_B477_CD9E),
    (0x0, 0x1, 0x0, 0x0, 0x10_1D06_08B0_ED8A, 0x3FD8_1CB3_9C7E_A3DC),
    (0x0, 0x1, 0x0, 0x1, 0x8_4E94_B4A2_201A, 0xBFD3_246E_788D_ABD2),
    (0x0, 0x1, 0x0, 0x7CFF, 0x6_CE70_AFDE_DDB5, 0xBFDB_F5DA_D09C_4E83),
    (0x0, 0x1, 0x0, 0xFFFFFFFF, 0x1F_DD5B_AABE_1442, 0x4015_DADC_2ED8_C430),
    (0x0, 0x0, 0x1, 0x0, 0x10_4B5D_BE7D_42C7, 0x3FD9_29AF_A401_9B9F),
    (0x0, 0x0, 0x1, 0x1, 0xA_C68F_27BB_0AE9, 0xBFB5_B274_75A1_D6C1),
    (0x0, 0x0, 0x1, 0x7CFF, 0x3_A085_C6A5_1925, 0xBFE8_E625_B434_CAE7),
    (0x0, 0x0, 0x1, 0xFFFFFFFF, 0x3_F605_B3F5_2B34, 0xBFE7_93D7_861A_D1B0),
    (
        0xFFFF_FFFF_FFFF_FFFF,
        0xFFFFFFFF,
        0x100_0000_0000,
        0x0,
        0x14_0C67_9DB0_9AE6,
        0x3FE8_535E_4522_7E23,
    ),
    (
        0xFFFF_FFFF_FFFF_FFFF,
        0xFFFFFFFF,
        0x100_0000_0000,
        0x1,
        0x13_6A0F_9EE8_58D9,
        0x3FE6_32C0_C1A0_487E,
    ),
    (
        0xFFFF_FFFF_FFFF_FFFF,
        0xFFFFFFFF,
        0x100_0000_0000,
        0x7CFF,
        0x1A_090C_B63B_3901,
        0x3FF9_419B_A8AD_71DE,
    ),
    (
        0xFFFF_FFFF_FFFF_FFFF,
        0xFFFFFFFF,
        0x100_0000_0000,
        0xFFFFFFFF,
        0x17_4DB7_6676_31F9,
        0x3FF2_6009_DCDE_0FAF,
    ),
    (0x123_4567_89AB_CDEF, 0x7, 0xFFF, 0x0, 0x2_FAA6_6DB1_4B8C, 0xBFEB_AB00_9A9D_A517),
    (0x123_4567_89AB_CDEF, 0x7, 0xFFF, 0x1, 0x8_B1E3_0606_6A17, 0xBFD0_F060_1371_F782),
    (0x123_4567_89AB_CDEF, 0x7, 0xFFF, 0x7CFF, 0x12_837E_B646_5BEA, 0x3FE3_4AE1_6839_766F),
    (0x123_4567_89AB_CDEF, 0x7, 0xFFF, 0xFFFFFFFF, 0xA5AE_29C8_E31B, 0xBFF5_C774_B671_DA0B),
];

/// Frozen Gumbel numbers of chosen bits: the extremes, the middle, and where the formula switches.
const GUMBELS: [(u64, u64); 10] = [
    (0x0, 0xC00C_FAD2_2446_6598),
    (0x1, 0xC00C_BDCF_5433_1916),
    (0x100000, 0xC009_0A3A_9E8D_C4B1),
    (0x8_0000_0000_0000, 0xBFD4_E793_6217_083C),
    (0x10_0000_0000_0000, 0x3FD7_74F2_9BDD_6BA0),
    (0x17_FFFF_FFFF_FFFF, 0x3FF3_EF34_2116_E5CF),
    (0x18_0000_0000_0000, 0x3FF3_EF34_2116_E5D0),
    (0x1F_FFFF_FFEF_FFFF, 0x4036_DFB5_0EF1_CBDF),
    (0x1F_FFFF_FFFF_FFFE, 0x4042_2A69_334D_B8C9),
    (0x1F_FFFF_FFFF_FFFF, 0x4042_B708_8723_20E2),
];

const TOP: u64 = (1 << 53) - 1;

#[test]
fn known_answers_are_frozen() {
    for (seed, sample_index, position, token, bits, gumbel) in VECTORS {
        let found = NoiseRow::new(seed, sample_index, position).bits(TokenId(token));
        let place = (seed, sample_index, position, token);
        assert_eq!(found.raw(), bits, "bits of {place:?}");
        assert_eq!(found.gumbel().to_bits(), gumbel, "Gumbel number of {place:?}");
    }
    for (bits, gumbel) in GUMBELS {
        let found = NoiseBits::from_raw(bits).gumbel();
        assert_eq!(found.to_bits(), gumbel, "Gumbel number of bits {bits:#x}: {found}");
    }
}

/// Bits at and around everything that is special, then random ones.
fn many_bits() -> Vec<u64> {
    let mut all = vec![0, 1, 2, TOP, TOP - 1, TOP - 2];
    for power in 0..53 {
        for near in [-1i64, 0, 1] {
            all.push(((1i64 << power) + near) as u64);
            all.push((TOP as i64 - (1i64 << power) + near) as u64 & TOP);
        }
    }
    let switch = 3 << 51;
    all.extend(switch - 5..switch + 5);
    let mut rng = Rng::new(1);
    for _ in 0..200_000 {
        // All sizes of tails, not only the usual middle.
        let bits = rng.bits() >> 11 >> rng.below(53);
        all.push(bits);
        all.push(TOP - bits);
    }
    all
}

#[test]
fn the_bound_holds_and_the_number_grows_with_the_bits() {
    let mut all = many_bits();
    all.sort_unstable();
    let mut previous = f64::NEG_INFINITY;
    for bits in all {
        let bits = NoiseBits::from_raw(bits);
        let gumbel = bits.gumbel();
        assert!(gumbel.is_finite() && gumbel <= bits.gumbel_bound(), "{bits:?}: {gumbel}");
        // Rounding may repeat a value, never turn the order around by more than a last bit.
        assert!(gumbel >= previous - 1e-14, "{bits:?}: {gumbel} after {previous}");
        previous = previous.max(gumbel);
    }
    // The tail reaches as far as 53 bits can: -ln(2^-54) above, -ln(54 ln 2) below.
    let ln2 = std::f64::consts::LN_2;
    assert!((NoiseBits::from_raw(TOP).gumbel() - 54.0 * ln2).abs() < 1e-9);
    assert!((NoiseBits::from_raw(0).gumbel() + (54.0 * ln2).ln()).abs() < 1e-12);
}

#[test]
fn the_number_is_the_textbook_formula() {
    let scale = (1u64 << 53) as f64;
    for bits in many_bits() {
        let found = NoiseBits::from_raw(bits).gumbel();
        // The side of the middle on which the subtraction loses nothing.
        let exponential = if bits < 1 << 52 {
            -((bits as f64 + 0.5) / scale).ln()
        } else {
            -(-(((1u64 << 53) - bits) as f64 - 0.5) / scale).ln_1p()
        };
        let wanted = -exponential.ln();
        assert!((found - wanted).abs() <= 1e-12 * wanted.abs().max(1.0), "{bits:#x}: {found}");
    }
}

/// Counts pairs of 4-bit cells and checks that they are uniform together.
fn assert_independent(what: &str, pairs: impl Iterator<Item = (NoiseBits, NoiseBits)>) {
    let cell = |bits: NoiseBits| (bits.raw() >> 49) as usize;
    // The lowest bits too: a weak finaliser fails there first.
    let low_cell = |bits: NoiseBits| (bits.raw() & 15) as usize;
    let (mut high, mut low) = (vec![0; 256], vec![0; 256]);
    for (a, b) in pairs {
        high[cell(a) * 16 + cell(b)] += 1;
        low[low_cell(a) * 16 + low_cell(b)] += 1;
    }
    for (which, counts) in [("high", high), ("low", low)] {
        let (statistic, degrees) = pearson(&counts, &[1.0 / 256.0; 256]);
        let limit = chi_square_limit(degrees, 1e-6);
        assert!(statistic < limit, "{what}, {which} bits: {statistic} of {limit}");
    }
}

#[test]
fn rows_and_tokens_are_independent() {
    timed("noise, independence", 5.0, || {
        let row = NoiseRow::new;
        let token = TokenId;
        let n = 100_000u64;
        let at = |i: u64| (i / 50, (i % 50) as u32);
        assert_independent(
            "neighbouring tokens",
            (0..n).map(|i| {
                let (seed, id) = at(i);
                (row(seed, 0, 9).bits(token(id)), row(seed, 0, 9).bits(token(id + 1)))
            }),
        );
        assert_independent(
            "neighbouring positions",
            (0..n).map(|i| {
                let (seed, id) = at(i);
                (row(seed, 0, 9).bits(token(id)), row(seed, 0, 10).bits(token(id)))
            }),
        );
        assert_independent(
            "neighbouring samples",
            (0..n).map(|i| {
                let (seed, id) = at(i);
                (row(seed, 0, 9).bits(token(id)), row(seed, 1, 9).bits(token(id)))
            }),
        );
        assert_independent(
            "neighbouring seeds",
            (0..n).map(|i| {
                let (seed, id) = at(i);
                (row(seed, 0, 9).bits(token(id)), row(seed + 1, 0, 9).bits(token(id)))
            }),
        );
        assert_independent(
            "seed and sample swapped",
            (0..n).map(|i| {
                let (seed, id) = at(i);
                (row(seed + 2, 1, 9).bits(token(id)), row(1, seed as u32 + 2, 9).bits(token(id)))
            }),
        );
        assert_independent(
            "far tokens of one row",
            (0..n).map(|i| {
                let row = row(3, 0, 0);
                (row.bits(token(i as u32)), row.bits(token(i as u32 ^ 0x8000_0000)))
            }),
        );
    });
}

#[test]
fn one_row_never_repeats_and_has_the_moments_of_gumbel() {
    let row = NoiseRow::new(11, 2, 40);
    let n = 1u32 << 18;
    let mut seen: Vec<u64> = (0..n).map(|id| row.bits(TokenId(id)).raw()).collect();
    let values: Vec<f64> = seen.iter().map(|&bits| NoiseBits::from_raw(bits).gumbel()).collect();
    seen.sort_unstable();
    seen.dedup();
    // A bijection of 64 bits cut to 53: 2^18 draws collide with probability 2^-18.
    assert_eq!(seen.len(), n as usize);
    let mean = values.iter().sum::<f64>() / f64::from(n);
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
    let wanted_variance = std::f64::consts::PI.powi(2) / 6.0;
    // Five standard errors; the variance's uses Gumbel's kurtosis of 5.4.
    let root_n = f64::from(n).sqrt();
    assert!((mean - 0.577_215_664_9).abs() < 5.0 * wanted_variance.sqrt() / root_n, "{mean}");
    assert!((variance / wanted_variance - 1.0).abs() < 5.0 * 4.4_f64.sqrt() / root_n, "{variance}");
}
