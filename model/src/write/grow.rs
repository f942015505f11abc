//! Owns growing: a larger network with the function of a given one, for figures at the cost of a
//! large model with the text and the acceptance of a small one.
//!
//! What is added cannot reach the output. Extra layers, heads and feed-forward units have random
//! weights, but output projections of zero. Extra hidden dimensions are zero in the embedding and
//! in every output projection, so the residual stream stays zero there. It then has `factor` times
//! the dimensions and the same sum of squares, so RMSNorm's mean square is `factor` times smaller;
//! with `eps / factor`, its scale is `sqrt(factor)` times larger, and norm weights divided by
//! `sqrt(factor)` give the same rows. The factor is 1, 4 or 16, hence all of this is exact in
//! binary floating point. Where products run block by block of 32 inputs in order, as the kernels
//! here do, blocks of zeros change no bit of a sum either: the grown network has the source's bits.

use std::ops::Range;

use super::rows::{self, RandomRows};
use super::shape::{GrowError, Growth};
use super::{Description, MatrixFormat, Metadata, NetworkFile, Place};
use crate::config::LlamaConfig;
use crate::load::{LoadedModel, Role};
use crate::weights::{LayerWeights, LlamaWeights, Matrix, MatrixData, Q8_0_BLOCK_LEN};

/// The network that `source`, loaded as Q8_0, grows to. `metadata` is everything but the
/// architecture: name and tokenizer. The same `seed` gives the same file.
///
/// # Errors
/// [`GrowError`] names what cannot be.
pub fn grown<'a>(
    source: &'a LoadedModel,
    growth: &Growth,
    metadata: Metadata,
    seed: u64,
) -> Result<NetworkFile<'a>, GrowError> {
    let config = growth.apply(&source.config)?;
    check_format(&source.weights)?;
    let is_tied = source.weights.output.is_none();
    let mut rows = GrownRows {
        source: &source.config,
        weights: &source.weights,
        grown: config.clone(),
        seed,
        current: None,
    };
    let rows = move |place: Place, row: usize, out: &mut Vec<u8>| rows.write(place, row, out);
    let format = MatrixFormat::Q8_0;
    Ok(NetworkFile::new(Description { config, is_tied, format, metadata }, Box::new(rows)))
}

/// Rows can only be copied as they are.
fn check_format(weights: &LlamaWeights) -> Result<(), GrowError> {
    let LlamaWeights { embedding, layers, output_norm: _, output } = weights;
    let outside = [(Role::Embedding, embedding)];
    let outside = outside.into_iter().chain(output.as_ref().map(|output| (Role::Output, output)));
    let outside = outside.map(|(role, matrix)| (role.gguf_name(0), matrix));
    let inside = layers.iter().enumerate().flat_map(|(index, layer)| {
        let LayerWeights { query, key, value, attention_output, gate, up, down, .. } = layer;
        let matrices = [
            (Role::Query, query),
            (Role::Key, key),
            (Role::Value, value),
            (Role::AttentionOutput, attention_output),
            (Role::Gate, gate),
            (Role::Up, up),
            (Role::Down, down),
        ];
        matrices.map(|(role, matrix)| (role.gguf_name(index), matrix))
    });
    for (name, matrix) in outside.chain(inside) {
        if !matches!(matrix.data, MatrixData::Q8_0 { .. }) {
            return Err(GrowError::Format(name));
        }
    }
    Ok(())
}

/// Makes the rows of a grown network.
struct GrownRows<'a> {
    source: &'a LlamaConfig,
    weights: &'a LlamaWeights,
    grown: LlamaConfig,
    seed: u64,
    /// Random numbers of the tensor in hand.
    current: Option<(Place, RandomRows)>,
}

impl<'a> GrownRows<'a> {
    fn write(&mut self, place: Place, row: usize, out: &mut Vec<u8>) {
        let from = self.source_row(place, row);
        let in_len = place.role.shape(&self.grown).last().copied().unwrap_or(0);
        match place.role {
            Role::OutputNorm | Role::AttentionNorm | Role::FfnNorm => self.norm(place, out),
            // Nothing may enter the extra dimensions, and nothing may come out of what is extra.
            Role::Embedding | Role::Down => {
                let copied_len = from.map_or(0, |(matrix, row)| copy(matrix, row, out));
                rows::q8_0_zeros(in_len - copied_len, out);
            }
            Role::AttentionOutput => self.attention_output(from, in_len, out),
            Role::Output | Role::Query | Role::Key | Role::Value | Role::Gate | Role::Up => {
                let copied_len = from.map_or(0, |(matrix, row)| copy(matrix, row, out));
                self.random(place, in_len - copied_len, out);
            }
        }
    }

    /// The matrix and row of the source that a row of the grown file holds, if any.
    fn source_row(&self, place: Place, row: usize) -> Option<(&'a Matrix, usize)> {
        let weights = self.weights;
        let layer = || weights.layers.get(place.layer);
        let (matrix, row) = match place.role {
            Role::Embedding => (&weights.embedding, row),
            Role::Output => (weights.output.as_ref()?, row),
            Role::Query => (&layer()?.query, self.query_row(row)?),
            Role::Key => (&layer()?.key, self.loaded_row(row)),
            Role::Value => (&layer()?.value, row),
            Role::AttentionOutput => (&layer()?.attention_output, row),
            Role::Gate => (&layer()?.gate, row),
            Role::Up => (&layer()?.up, row),
            Role::Down => (&layer()?.down, row),
            Role::OutputNorm | Role::AttentionNorm | Role::FfnNorm => return None,
        };
        (row < matrix.out_len).then_some((matrix, row))
    }

    /// Where the loader puts row `row` of a file's queries or keys: pairs that turn together are
    /// neighbours in a file and half a head apart in memory.
    fn loaded_row(&self, row: usize) -> usize {
        let head_dim = self.source.head_dim;
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + at / 2 + at % 2 * (head_dim / 2)
    }

    /// The source's row of a query row of the file.
    fn query_row(&self, row: usize) -> Option<usize> {
        let head_dim = self.source.head_dim;
        let head = self.source_head(row / head_dim)?;
        Some(self.loaded_row(head * head_dim + row % head_dim))
    }

    /// The source's query head that a query head of the grown network is: those of a group come
    /// first in their group.
    fn source_head(&self, head: usize) -> Option<usize> {
        let (group, member) = (head / self.grown.group_len(), head % self.grown.group_len());
        let group_len = self.source.group_len();
        let is_source = group < self.source.num_kv_heads && member < group_len;
        is_source.then_some(group * group_len + member)
    }

    /// Inputs of the source's heads where they are now, zeros for the others.
    fn attention_output(&self, from: Option<(&Matrix, usize)>, in_len: usize, out: &mut Vec<u8>) {
        let Some((matrix, row)) = from else { return rows::q8_0_zeros(in_len, out) };
        if self.grown.group_len() == self.source.group_len() {
            // In one piece: heads may be narrower than a block.
            let copied_len = copy(matrix, row, out);
            return rows::q8_0_zeros(in_len - copied_len, out);
        }
        let head_dim = self.source.head_dim;
        for head in 0..self.grown.num_heads {
            match self.source_head(head) {
                Some(head) => copy_part(matrix, row, head * head_dim..(head + 1) * head_dim, out),
                None => rows::q8_0_zeros(head_dim, out),
            }
        }
    }

    /// Weights of a norm. Those of extra dimensions meet zeros only, those of extra layers give
    /// rows of the usual size.
    fn norm(&self, place: Place, out: &mut Vec<u8>) {
        let weights = self.weights;
        let layer = weights.layers.get(place.layer);
        let source: &[f32] = match place.role {
            Role::OutputNorm => &weights.output_norm,
            Role::AttentionNorm => layer.map_or(&[], |layer| &layer.attention_norm),
            Role::FfnNorm => layer.map_or(&[], |layer| &layer.ffn_norm),
            Role::Embedding | Role::Output | Role::Query | Role::Key | Role::Value => &[],
            Role::AttentionOutput | Role::Gate | Role::Up | Role::Down => &[],
        };
        let rescale = 1.0 / (self.grown.hidden_len as f32 / self.source.hidden_len as f32).sqrt();
        let mut weights: Vec<f32> = source.iter().map(|weight| weight * rescale).collect();
        weights.resize(self.grown.hidden_len, rescale);
        rows::floats(&weights, out);
    }

    /// Random weights that give outputs of the size of their inputs. Extra dimensions of the input
    /// are zero, so only the source's count.
    fn random(&mut self, place: Place, len: usize, out: &mut Vec<u8>) {
        let seed = self.seed;
        let stream = match &mut self.current {
            Some((at, stream)) if *at == place => stream,
            other => {
                let name = place.role.gguf_name(place.layer);
                &mut other.insert((place, RandomRows::new(seed, &name))).1
            }
        };
        let deviation = 1.0 / (self.source.hidden_len as f32).sqrt();
        stream.weights(MatrixFormat::Q8_0, len, deviation, out);
    }
}

/// Appends a row of a matrix and returns its length.
fn copy(matrix: &Matrix, row: usize, out: &mut Vec<u8>) -> usize {
    copy_part(matrix, row, 0..matrix.in_len, out);
    matrix.in_len
}

/// Appends inputs `part`, whole blocks, of a row of a matrix.
fn copy_part(matrix: &Matrix, row: usize, part: Range<usize>, out: &mut Vec<u8>) {
    let MatrixData::Q8_0 { scales, quants } = &matrix.data else {
        unreachable!("the format of every matrix was checked");
    };
    let (start, end) = (row * matrix.in_len + part.start, row * matrix.in_len + part.end);
    let blocks = start / Q8_0_BLOCK_LEN..end / Q8_0_BLOCK_LEN;
    rows::q8_0(&scales[blocks], &quants[start..end], out);
}
