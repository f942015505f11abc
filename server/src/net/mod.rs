//! The connection layer: one hyper server that carries gRPC and plain HTTP on one port. Knows
//! connections and bytes; knows no services, models or engine.

pub(crate) mod settings;
