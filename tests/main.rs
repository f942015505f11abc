//! The test binary of the workspace, but for what `allocations.rs` counts: a list of its modules.
//! Each opens with what it proves; everything they share lives in `harness/`.
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the place and the value")]
#![allow(clippy::disallowed_methods, reason = "expected values never reach output")]

mod aborts;
mod attention;
mod bad_requests;
mod blocks;
mod chat;
mod checkpoint_files;
mod choice;
mod client_errors;
mod command_line;
mod connections;
mod deadlines;
mod distribution;
mod drain;
mod embedded_pair;
mod engine_faults;
mod error_details;
mod exactness;
mod fairness;
mod floods;
mod golden;
mod grow;
mod grpc;
mod grpc_exactness;
mod grpc_lifecycle;
mod grpc_services;
mod grpc_sharing;
mod kernels;
mod malformed_messages;
mod metrics;
mod model_files;
mod noise;
mod products;
mod program;
mod raw_grpc;
mod raw_http2;
mod recorded_output;
mod row_invariance;
mod row_scans;
mod samples;
mod settings;
mod sharing;
mod simulation;
mod slow_readers;
mod tidy;
mod tokenizer;
mod unruly_clients;
mod weight_formats;
