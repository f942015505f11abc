//! The gRPC edge: wire requests become engine requests, engine events become wire events, every
//! error becomes exactly one status. Knows the engine by its handle and its closed event and
//! request types only. Read `service.rs` first, then `validate.rs`.

pub(crate) mod calls;
pub(crate) mod events;
pub(crate) mod limits;
pub(crate) mod refusal;
pub(crate) mod routes;
pub(crate) mod served;
pub(crate) mod service;
pub(crate) mod status;
pub(crate) mod timeout;
pub(crate) mod validate;
