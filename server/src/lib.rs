//! The slipstream server: `run(config, listener, shutdown)` and the [`engine`] it runs.

pub mod engine;
pub mod handle;
