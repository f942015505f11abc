//! What the benches share. A bench prints the plain figure beside every speculative one, compares
//! within one run, and gives medians and spans: see `README.md` here.

pub mod stats;
