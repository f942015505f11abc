//! The slipstream server: `run(config, listeners, shutdown)` and the [`engine`] it runs.

mod backend;
mod canceller;
pub mod cli;
pub mod config;
mod embedded;
pub mod engine;
mod grpc;
pub mod handle;
mod http;
mod kv_budget;
pub mod local;
mod logging;
pub mod metrics;
mod net;
mod notify;
mod run;
mod shutdown;
mod stage;
pub mod startup;
mod watchdog;

pub use net::settings::NetConfig;
pub use run::{Listeners, RunError, run};
pub use shutdown::{Shutdown, Stopper};
pub use startup::StartupError;
