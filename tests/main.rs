//! The one test binary of the workspace: a list of its modules. Each module opens with what it
//! proves; everything they share lives in `harness/`.
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the place and the value")]
#![allow(clippy::disallowed_methods, reason = "expected values never reach output")]

mod bad_requests;
mod blocks;
mod checkpoint_files;
mod choice;
mod command_line;
mod deadlines;
mod distribution;
mod exactness;
mod golden;
mod grpc;
mod grpc_exactness;
mod grpc_lifecycle;
mod kernels;
mod model_files;
mod noise;
mod recorded_output;
mod row_invariance;
mod simulation;
mod tidy;
mod tokenizer;
mod unruly_clients;
