//! What draft and verifier share: token choice and its noise, ragged batches, the paged KV pool,
//! the Llama network with its kernels, and the loading of model files.
//!
//! Read `forward.rs` first (the seam that the engine sees), then `transformer.rs` (what stands
//! behind it) and `choice.rs` (how a row of logits becomes a token). `unsafe` exists only in
//! `kernels/`.

pub mod aligned;
pub mod attention;
pub mod batch;
pub mod block_manager;
pub mod choice;
pub mod clock;
pub mod compute;
pub mod config;
pub mod digest;
pub mod error;
pub mod forward;
pub mod ids;
pub mod kernels;
pub mod kv_pool;
pub mod linear;
pub mod load;
pub mod math;
pub mod noise;
pub mod packed;
pub mod proposal;
pub mod reference;
pub mod rope;
pub mod sampling;
pub mod stage_times;
pub mod token_bytes;
pub mod tokenizer;
pub mod transformer;
pub mod tuning;
pub mod weights;
pub mod write;
