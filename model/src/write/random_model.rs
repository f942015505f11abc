//! Owns networks of random numbers, for figures that depend on the size of a model and not on what
//! it says. Deterministic: the same seed gives the same file.

use super::rows::{self, RandomRows};
use super::{Description, MatrixFormat, Metadata, NetworkFile, Place};
use crate::config::LlamaConfig;
use crate::load::Role;

/// A random network of this shape. Norms are 1; matrices have the variance 1 / inputs, which keeps
/// activations at the size they came in. `metadata` is everything but the architecture: name and
/// tokenizer.
///
/// # Panics
/// When an input length is no multiple of 32.
#[must_use]
pub fn random_model(
    config: LlamaConfig,
    is_tied: bool,
    format: MatrixFormat,
    metadata: Metadata,
    seed: u64,
) -> NetworkFile<'static> {
    let shape = config.clone();
    let mut current: Option<(Place, RandomRows)> = None;
    let source = move |place: Place, _row: usize, out: &mut Vec<u8>| {
        let dims = place.role.shape(&shape);
        let &[_, inputs] = dims.as_slice() else {
            return rows::floats(&vec![1.0; dims.iter().product()], out);
        };
        // Looked up, not multiplied: the residual stream begins at the size of a norm's output.
        let is_looked_up = place.role == Role::Embedding && !is_tied;
        let deviation = if is_looked_up { 1.0 } else { 1.0 / (inputs as f32).sqrt() };
        let stream = match &mut current {
            Some((at, stream)) if *at == place => stream,
            other => {
                let name = place.role.gguf_name(place.layer);
                &mut other.insert((place, RandomRows::new(seed, &name))).1
            }
        };
        stream.weights(format, inputs, deviation, out);
    };
    NetworkFile::new(Description { config, is_tied, format, metadata }, Box::new(source))
}
