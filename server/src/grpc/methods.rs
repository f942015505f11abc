//! Owns the list of everything that can be called over gRPC. Routing, health, the record of calls
//! and what unknown calls are told all follow it.

use slipstream_proto::v1::{completions_server, models_server, tokenization_server};

/// One method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    /// `/service/method`, as calls name it.
    pub(crate) path: &'static str,
    /// Whether a call may send more than one message.
    pub(crate) takes_many: bool,
}

const fn one(path: &'static str) -> Method {
    Method { path, takes_many: false }
}

const fn many(path: &'static str) -> Method {
    Method { path, takes_many: true }
}

/// Every method there is.
pub(crate) const METHODS: [Method; 11] = [
    one("/slipstream.v1.Completions/Generate"),
    one("/slipstream.v1.Completions/Complete"),
    one("/slipstream.v1.Completions/Abort"),
    one("/slipstream.v1.Models/List"),
    one("/slipstream.v1.Models/Get"),
    one("/slipstream.v1.Tokenization/Tokenize"),
    one("/slipstream.v1.Tokenization/Detokenize"),
    one("/grpc.health.v1.Health/Check"),
    one("/grpc.health.v1.Health/Watch"),
    many("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    many("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
];

/// Names that health is reported under: the whole server and each service of its own.
pub(crate) const HEALTH_NAMES: [&str; 4] = [
    "",
    completions_server::SERVICE_NAME,
    models_server::SERVICE_NAME,
    tokenization_server::SERVICE_NAME,
];

/// The place of a path in [`METHODS`].
pub(crate) fn index_of(path: &str) -> Option<usize> {
    METHODS.iter().position(|method| method.path == path)
}

/// All methods, for people.
pub(crate) fn listed() -> String {
    let names = METHODS.iter().map(|method| method.path.trim_start_matches('/'));
    names.collect::<Vec<_>>().join(", ")
}
