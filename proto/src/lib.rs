//! The wire format: messages, clients and servers generated from the files under `slipstream/`.
//! Nothing here is written by hand; units and limits stand in the protocol files' comments.

/// `slipstream.v1`: completions, models, tokenization.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated; comments come from the protocol files"
)]
pub mod v1 {
    tonic::include_proto!("slipstream.v1");
}

/// All protocol files as an encoded `google.protobuf.FileDescriptorSet`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/slipstream.bin"));
