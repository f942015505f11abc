//! The cost of the wire: the same load in this process and over gRPC.
fn main() {}
