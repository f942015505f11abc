//! The connection layer: one hyper server that carries gRPC and plain HTTP on one port. Knows
//! connections and bytes; knows no services, models or engine.
//!
//! `listener.rs` accepts, `connection.rs` drives one connection, `lifetime.rs` decides when it has
//! to go, `request.rs` counts what it answers and sees who takes nothing, `frame_meter.rs` bounds
//! what a peer may send besides requests.

mod connection;
pub(crate) mod files;
mod frame_meter;
mod lifetime;
pub(crate) mod listener;
mod request;
pub(crate) mod settings;
pub(crate) mod stats;
