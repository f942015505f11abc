//! Compiles the protocol files in pure Rust: no `protoc` has to be installed.
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "how one talks to cargo")]

use std::error::Error;
use std::path::PathBuf;

const PROTOS: [&str; 3] = [
    "slipstream/v1/slipstream.proto",
    "slipstream/v1/models.proto",
    "slipstream/v1/tokenization.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
    }
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(PROTOS)?;
    // The encoded set is for server reflection.
    std::fs::write(out_dir.join("slipstream.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
