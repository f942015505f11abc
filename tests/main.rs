//! The one test binary of the workspace: a list of its modules. Each module opens with what it
//! proves; everything they share lives in `harness/`.
#![allow(clippy::unwrap_used)]
