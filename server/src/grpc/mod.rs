//! The gRPC edge: wire requests become engine requests, engine events become wire events, every
//! error becomes exactly one status. Knows the engine by its handle and its closed event and
//! request types only. Read `routes.rs` and `around.rs` first, then `service.rs` and `validate.rs`.

mod around;
pub(crate) mod caller;
pub(crate) mod calls;
mod completion;
pub(crate) mod events;
mod framing;
mod health;
pub(crate) mod limits;
pub(crate) mod live_calls;
pub(crate) mod methods;
mod models;
mod offload;
pub(crate) mod record;
pub(crate) mod refusal;
pub(crate) mod routes;
pub(crate) mod served;
pub(crate) mod service;
mod shared;
mod sharing;
pub(crate) mod status;
pub(crate) mod timeout;
mod tokenization;
mod trace_context;
pub(crate) mod validate;
