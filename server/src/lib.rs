//! The slipstream server: `run(config, listener, shutdown)` and the [`engine`] it runs.

pub mod cli;
pub mod config;
mod embedded;
pub mod engine;
mod grpc;
pub mod handle;
pub mod local;
mod logging;
mod run;
mod shutdown;
pub mod startup;

pub use run::{RunError, run};
pub use startup::StartupError;
