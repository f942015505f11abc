//! Owns the multiply-adds of `products.rs` on registers alone: what they could reach if memory,
//! loads and everything else were free. Every chain feeds its sums back as inputs, so that no round
//! can be left out; enough of them run side by side to hide how long an instruction takes.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::super::peak::Mix;
use super::{load, load_i8, store, store_i8};

/// Chains side by side. With constants and intermediate results they fill the 16 registers.
const CHAINS: usize = 10;

/// Groups of products that are added in 16 bits before they are widened.
const Q4_GROUPS: usize = 4;

/// Makes rounds of a mix and returns the multiply-adds of one.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn peak(mix: Mix, rounds: u64) -> u64 {
    let per_chain = match mix {
        Mix::Q8_0 => {
            q8_0(rounds);
            32
        }
        Mix::Q4_0 => {
            q4_0(rounds);
            2 * 32 * Q4_GROUPS
        }
        Mix::Floats => {
            floats(rounds);
            8
        }
    };
    (per_chain * CHAINS) as u64
}

/// Numbers that the compiler knows nothing of.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unknown() -> [__m256i; CHAINS] {
    let mut chains = [_mm256_setzero_si256(); CHAINS];
    for (index, chain) in chains.iter_mut().enumerate() {
        *chain = load_i8(&black_box([index as i8 + 1; 32]));
    }
    chains
}

/// Makes the compiler believe that somebody looks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn look_at(chains: [__m256i; CHAINS]) {
    for chain in chains {
        let mut bytes = [0; 32];
        store_i8(&mut bytes, chain);
        black_box(bytes);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0(rounds: u64) {
    let (mut sums, ones) = (unknown(), _mm256_set1_epi16(1));
    let weights = load_i8(&black_box([-3; 32]));
    let magnitudes = _mm256_abs_epi8(weights);
    for _ in 0..rounds {
        for sum in &mut sums {
            let signed = _mm256_sign_epi8(*sum, weights);
            let pairs = _mm256_maddubs_epi16(magnitudes, signed);
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
        }
    }
    look_at(sums);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_0(rounds: u64) {
    let (mut sums, ones) = (unknown(), _mm256_set1_epi16(1));
    let (low, high) = (load_i8(&black_box([3; 32])), load_i8(&black_box([5; 32])));
    for _ in 0..rounds {
        for _ in 0..Q4_GROUPS {
            for sum in &mut sums {
                let pairs = _mm256_add_epi16(
                    _mm256_maddubs_epi16(low, *sum),
                    _mm256_maddubs_epi16(high, *sum),
                );
                *sum = _mm256_add_epi16(*sum, pairs);
            }
        }
        for sum in &mut sums {
            *sum = _mm256_madd_epi16(*sum, ones);
        }
    }
    look_at(sums);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn floats(rounds: u64) {
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    for (index, sum) in sums.iter_mut().enumerate() {
        *sum = load(&black_box([index as f32; 8]));
    }
    let (weights, inputs) = (load(&black_box([0.5; 8])), load(&black_box([0.25; 8])));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(weights, inputs, *sum);
        }
    }
    for sum in sums {
        let mut lanes = [0.0; 8];
        store(&mut lanes, sum);
        black_box(lanes);
    }
}
