//! Owns the arithmetic of the network: products, attention, norms, scans, the exponential. Knows
//! lengths and layouts; knows no layers, no sequences and no policy.
//!
//! Every kernel is one safe function here that checks every length, also in release builds, and
//! hands over to the implementation that [`Isa`] names. `plain.rs` *defines* the bits of every
//! result; the others must equal it bit for bit, which is what makes output the same on every
//! machine. The order of every sum is part of the definition and depends on nothing but the
//! lengths of the model: never on how many rows share a call, on tiling or on threads. The one
//! thing left open is which NaN a NaN is.
//!
//! A new kernel is written in `plain.rs` or a file below it, gets an entry in the table of function
//! pointers here, a safe entry point, and a case in the tests, which compare every implementation
//! this CPU has.

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod memory;
pub mod packed;
pub mod peak;
mod plain;
pub mod products;
pub mod scan;
pub mod team;
pub mod tile;

use packed::{Bf16Lanes, F16Lanes, F32Lanes, Q4Tile, Q8Tile};
use products::{FloatProduct, QuantBlock, QuantProduct};

/// Version of everything that fixes output bits: these kernels, their order of operations, the
/// activation quantisation, [`SPLIT_LEN`], rotary tables, token choice and its noise. It is part of
/// the fingerprint of every response.
///
/// Raise it by hand with any change after which some model, prompt and seed may give other bytes:
/// another order of a sum, other polynomial coefficients, other rounding, another split length.
/// A faster kernel with the same bits does not raise it. Recorded output guards it.
pub const NUMERICS_VERSION: u32 = 1;

/// Numbers that share one scale in quantised products, of weights and of activations.
pub const QUANT_BLOCK_LEN: usize = crate::weights::Q8_0_BLOCK_LEN;

/// Absolute positions per attention split: split `s` covers `SPLIT_LEN * s ..`. Part of the bits.
pub const SPLIT_LEN: usize = 256;

/// Activation blocks whose largest magnitude is below this (2^-100) count as zero, because
/// `127 / amax` of still smaller ones would overflow.
pub const AMAX_MIN: f32 = f32::from_bits((127 - 100) << 23);

/// An implementation of the kernels that this machine can run. Decided once, when a network is
/// built; cannot change any output bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// The plain twins: any machine, the definition, slow.
    Plain,
    /// AVX2 with FMA and F16C. Only [`Isa::detect`] and [`Isa::available`] can make it.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// AVX-512 with VNNI for the quantised products, AVX2 for the rest. Made as the one above.
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

impl Isa {
    /// The fastest implementation that this machine can run.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Plain)
    }

    /// Every implementation that this machine can run, [`Isa::Plain`] first, the fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(avx2::Avx2::detect().map(Self::Avx2));
            all.extend(avx512::Avx512::detect().map(Self::Avx512));
        }
        all
    }

    /// Name for logs and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512-vnni",
        }
    }

    fn kernels(self) -> &'static Kernels {
        match self {
            Self::Plain => &plain::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(proof) => proof.kernels(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(proof) => proof.kernels(),
        }
    }
}

/// One implementation. The functions may rely on the lengths that the entry points check.
#[derive(Clone, Copy)]
struct Kernels {
    product_f32: FloatProduct<F32Lanes>,
    product_f16: FloatProduct<F16Lanes>,
    product_bf16: FloatProduct<Bf16Lanes>,
    product_q8_0: QuantProduct<Q8Tile>,
    product_q4_0: QuantProduct<Q4Tile>,
    quantise: fn(&[f32], &mut [QuantBlock]),
    rms_norm: fn(&[f32], &[f32], f32, &mut [f32]),
    swiglu: fn(&mut [f32], &[f32]),
    attention: &'static attention::AttentionKernels,
    exp: fn(&mut [f32]),
    scan: &'static scan::ScanKernels,
    /// See [`peak::multiply_adds`].
    peak: Option<peak::Peak>,
}

/// RMSNorm (arXiv 1910.07467, equation 4): `out = (x * scale) * weight` with
/// `scale = 1 / sqrt(sum(x^2) / n + eps)`. The sum runs in 8 lanes (lane = index % 8) of fused
/// multiply-adds, added up by the fixed tree.
///
/// All slices are `[n]`.
///
/// # Panics
/// When the lengths disagree or are zero.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(!x.is_empty(), "a norm needs numbers");
    assert!(x.len() == weight.len() && x.len() == out.len(), "one weight and output per number");
    (isa.kernels().rms_norm)(x, weight, eps, out);
}

/// SwiGLU (arXiv 2002.05202, equation 6): `gate = gate / (1 + exp(-gate)) * up`, element by
/// element. Both slices are `[n]`.
///
/// # Panics
/// When the lengths disagree.
pub fn swiglu(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "one up number per gate");
    (isa.kernels().swiglu)(gate, up);
}

/// Natural exponential of every element, within [`EXP_ULPS`] of the exact value. Results below
/// the normal range are rounded once more; NaN stays NaN.
pub fn exp_slice(isa: Isa, values: &mut [f32]) {
    (isa.kernels().exp)(values);
}

/// Natural exponential of one number: the same bits as [`exp_slice`].
#[must_use]
pub fn exp(x: f32) -> f32 {
    plain::exp(x)
}

/// Largest error of [`exp`] in units in the last place, for results in the normal range.
pub const EXP_ULPS: u32 = 1;
