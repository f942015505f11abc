//! Owns the assembly of typed weights from the tensors of a checked file: which tensors a Llama
//! network has, their names in both formats, their shapes, their format in memory. Knows the file
//! only as names, shapes and numbers.

use std::collections::{BTreeMap, BTreeSet};

use super::convert::{self, Conversion};
use super::gguf::ROPE_DIVISORS;
use super::source::Source;
use super::stored::{HeldType, StoredTensor};
use super::{Converted, LoadOptions, LoadProgress, LoadStage, ParsedConfig};
use crate::config::LlamaConfig;
use crate::error::{LoadError, tensor};
use crate::weights::{
    LayerWeights, LlamaWeights, Matrix, MatrixData, Q4_0_BLOCK_LEN, Q8_0_BLOCK_LEN,
};

/// Tensors of a network, apart from their layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Embedding,
    OutputNorm,
    Output,
    AttentionNorm,
    Query,
    Key,
    Value,
    AttentionOutput,
    FfnNorm,
    Gate,
    Up,
    Down,
}

/// Roles that occur in every layer.
const LAYER_ROLES: [Role; 9] = [
    Role::AttentionNorm,
    Role::Query,
    Role::Key,
    Role::Value,
    Role::AttentionOutput,
    Role::FfnNorm,
    Role::Gate,
    Role::Up,
    Role::Down,
];

/// The layer that roles outside the layers are looked up with.
const NO_LAYER: usize = 0;

impl Role {
    /// `[out, in]`, or `[len]` of a norm.
    pub(crate) fn shape(self, config: &LlamaConfig) -> Vec<usize> {
        let hidden = config.hidden_len;
        match self {
            Self::Embedding | Self::Output => vec![config.vocab_size, hidden],
            Self::OutputNorm | Self::AttentionNorm | Self::FfnNorm => vec![hidden],
            Self::Query => vec![config.query_len(), hidden],
            Self::Key | Self::Value => vec![config.kv_len(), hidden],
            Self::AttentionOutput => vec![hidden, config.query_len()],
            Self::Gate | Self::Up => vec![config.ffn_len, hidden],
            Self::Down => vec![hidden, config.ffn_len],
        }
    }

    /// The name in a checkpoint of transformers.
    fn hf_name(self, layer: usize) -> String {
        let in_layer = match self {
            Self::Embedding => return "model.embed_tokens.weight".to_owned(),
            Self::OutputNorm => return "model.norm.weight".to_owned(),
            Self::Output => return "lm_head.weight".to_owned(),
            Self::AttentionNorm => "input_layernorm",
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::AttentionOutput => "self_attn.o_proj",
            Self::FfnNorm => "post_attention_layernorm",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        };
        format!("model.layers.{layer}.{in_layer}.weight")
    }

    /// The name in a GGUF file.
    pub(crate) fn gguf_name(self, layer: usize) -> String {
        let in_layer = match self {
            Self::Embedding => return "token_embd.weight".to_owned(),
            Self::OutputNorm => return "output_norm.weight".to_owned(),
            Self::Output => return "output.weight".to_owned(),
            Self::AttentionNorm => "attn_norm",
            Self::Query => "attn_q",
            Self::Key => "attn_k",
            Self::Value => "attn_v",
            Self::AttentionOutput => "attn_output",
            Self::FfnNorm => "ffn_norm",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        };
        format!("blk.{layer}.{in_layer}.weight")
    }
}

/// Whose names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    HuggingFace,
    Gguf,
}

/// A file whose header was found sound.
pub(super) struct TensorFile<'a> {
    pub(super) source: Source<'a>,
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    pub(super) dialect: Dialect,
}

impl TensorFile<'_> {
    fn name_of(&self, role: Role, layer: usize) -> String {
        match self.dialect {
            Dialect::HuggingFace => role.hf_name(layer),
            Dialect::Gguf => role.gguf_name(layer),
        }
    }

    fn get(&self, name: &str) -> Result<&StoredTensor, LoadError> {
        self.tensors.get(name).ok_or_else(|| LoadError::missing(tensor(name)))
    }

    /// Tensors that hold no weights: what they say is known from the configuration, or read there.
    fn is_known_extra(&self, name: &str) -> bool {
        match self.dialect {
            Dialect::HuggingFace => name.ends_with(".rotary_emb.inv_freq"),
            Dialect::Gguf => name == ROPE_DIVISORS,
        }
    }
}

/// Reads all weights, and says which matrices did not keep their format. Names, shapes, formats and
/// memory are checked for the whole file before the first tensor is read.
pub(super) fn read(
    file: &TensorFile<'_>,
    parsed: &ParsedConfig,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(LlamaWeights, Vec<Converted>), LoadError> {
    let config = &parsed.llama;
    let output_name = file.name_of(Role::Output, NO_LAYER);
    let has_output = file.tensors.contains_key(&output_name);
    let is_tied = parsed.is_tied.unwrap_or(!has_output);
    let total = check_tensors(file, config, options, !is_tied || has_output)?;
    check_memory(file, config, options)?;
    let converted = BTreeMap::new();
    let mut reader = Reader { file, config, options, progress, converted, done: 0, total };
    let embedding = reader.matrix(Role::Embedding, NO_LAYER)?;
    let layers = (0..config.num_layers).map(|l| reader.layer(l)).collect::<Result<_, _>>()?;
    let output_norm = reader.norm(Role::OutputNorm, NO_LAYER)?;
    let output = match (is_tied, has_output) {
        (false, _) => Some(reader.matrix(Role::Output, NO_LAYER)?),
        (true, false) => None,
        (true, true) if reader.matrix(Role::Output, NO_LAYER)? == embedding => None,
        (true, true) => {
            let reason = "config.json ties it to the embedding, but the two differ";
            return Err(LoadError::mismatch(tensor(&output_name), reason));
        }
    };
    let converted = reader.converted.into_iter();
    let converted = converted.map(|((from, to), num)| Converted { from, to, num_matrices: num });
    Ok((LlamaWeights { embedding, layers, output_norm, output }, converted.collect()))
}

/// All tensors of a network with their layers.
pub(crate) fn slots(
    config: &LlamaConfig,
    has_output: bool,
) -> impl Iterator<Item = (Role, usize)> + use<> {
    let outside =
        [Role::Embedding, Role::OutputNorm].into_iter().chain(has_output.then_some(Role::Output));
    let inside = (0..config.num_layers).flat_map(|l| LAYER_ROLES.into_iter().map(move |r| (r, l)));
    outside.map(|role| (role, NO_LAYER)).chain(inside)
}

/// Every tensor of the network is there in its shape, with rows that fit its format in memory, and
/// there is no other. Returns their bytes.
fn check_tensors(
    file: &TensorFile<'_>,
    config: &LlamaConfig,
    options: &LoadOptions,
    has_output: bool,
) -> Result<u64, LoadError> {
    let mut wanted = BTreeSet::new();
    let mut total = 0;
    for (role, layer) in slots(config, has_output) {
        let name = file.name_of(role, layer);
        let stored = file.get(&name)?;
        let (shape, expected) = (&stored.shape, role.shape(config));
        if *shape != expected {
            let reason = format!("its shape is {shape:?}, the configuration asks for {expected:?}");
            return Err(LoadError::mismatch(tensor(&name), reason));
        }
        if let [_, in_len] = expected[..] {
            let held = stored.stored_type.held(options.format);
            let block_len = held.block_len();
            if !in_len.is_multiple_of(block_len) {
                let held = held.name();
                let reason =
                    format!("rows of {in_len} are no multiple of {block_len}, as {held} needs");
                return Err(LoadError::unsupported(tensor(&name), reason));
            }
        }
        total += stored.num_bytes();
        wanted.insert(name);
    }
    for name in file.tensors.keys() {
        if !wanted.contains(name) && !file.is_known_extra(name) {
            return Err(LoadError::unsupported(tensor(name), "no part of this Llama network"));
        }
    }
    Ok(total)
}

/// Estimates the peak: all weights in memory, the largest matrix once more (its rows are put into
/// another order, and packing for the kernels has it twice for a moment), the buffers of a
/// conversion, and the rotary tables, which a few bytes of configuration can make large. The file
/// itself is never in memory.
fn check_memory(
    file: &TensorFile<'_>,
    config: &LlamaConfig,
    options: &LoadOptions,
) -> Result<(), LoadError> {
    let has_output = file.tensors.contains_key(&file.name_of(Role::Output, NO_LAYER));
    let mut weights = 0u64;
    let mut largest = 0u64;
    let mut buffers = 0u64;
    for (role, layer) in slots(config, has_output) {
        let stored = file.get(&file.name_of(role, layer))?;
        let num_weights = stored.num_weights() as u64;
        let held = match stored.shape.len() {
            2 => stored.stored_type.held(options.format),
            _ => HeldType::F32,
        };
        let bytes = held.num_bytes(num_weights);
        weights = weights.saturating_add(bytes);
        largest = largest.max(bytes);
        buffers = buffers.max(convert::buffer_bytes(num_weights));
    }
    let rotary_tables = config.context_len as u64 * config.head_dim as u64 * 4;
    let parts = [weights, largest, buffers, rotary_tables];
    let needed_bytes = parts.into_iter().fold(0, u64::saturating_add);
    if needed_bytes > options.memory_budget_bytes {
        return Err(LoadError::OverBudget {
            what: "the model".to_owned(),
            needed_bytes,
            budget_bytes: options.memory_budget_bytes,
        });
    }
    Ok(())
}

struct Reader<'a> {
    file: &'a TensorFile<'a>,
    config: &'a LlamaConfig,
    options: &'a LoadOptions,
    progress: &'a mut dyn FnMut(LoadProgress),
    /// Matrices by what they were and what they have become.
    converted: BTreeMap<(&'static str, &'static str), usize>,
    done: u64,
    total: u64,
}

impl Reader<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerWeights, LoadError> {
        Ok(LayerWeights {
            attention_norm: self.norm(Role::AttentionNorm, layer)?,
            query: self.matrix(Role::Query, layer)?,
            key: self.matrix(Role::Key, layer)?,
            value: self.matrix(Role::Value, layer)?,
            attention_output: self.matrix(Role::AttentionOutput, layer)?,
            ffn_norm: self.norm(Role::FfnNorm, layer)?,
            gate: self.matrix(Role::Gate, layer)?,
            up: self.matrix(Role::Up, layer)?,
            down: self.matrix(Role::Down, layer)?,
        })
    }

    fn norm(&mut self, role: Role, layer: usize) -> Result<Vec<f32>, LoadError> {
        let name = self.file.name_of(role, layer);
        let stored = self.file.get(&name)?;
        let conversion = Conversion { source: &self.file.source, name: &name, tensor: stored };
        let weights = conversion.finite_floats()?;
        self.report(stored);
        Ok(weights)
    }

    fn matrix(&mut self, role: Role, layer: usize) -> Result<Matrix, LoadError> {
        let name = self.file.name_of(role, layer);
        let stored = self.file.get(&name)?;
        let held = stored.stored_type.held(self.options.format);
        let conversion = Conversion { source: &self.file.source, name: &name, tensor: stored };
        let mut data = conversion.read(held)?;
        let shape = role.shape(self.config);
        let (out_len, in_len) = (shape[0], shape[1]);
        let is_gguf = self.file.dialect == Dialect::Gguf;
        if is_gguf && matches!(role, Role::Query | Role::Key) {
            data = rotate_half_order(&data, in_len, self.config.head_dim);
        }
        let (from, to) = (stored.stored_type.name(), held.name());
        if from != to {
            *self.converted.entry((from, to)).or_default() += 1;
        }
        self.report(stored);
        Ok(Matrix { out_len, in_len, data })
    }

    fn report(&mut self, stored: &StoredTensor) {
        self.done += stored.num_bytes();
        (self.progress)(LoadProgress {
            stage: LoadStage::Weights,
            done_bytes: self.done,
            total_bytes: self.total,
        });
    }
}

/// Puts query or key rows of a GGUF file into rotate-half order. There, rows `2i` and `2i + 1` of a
/// head turn together; here, rows `i` and `i + head_dim / 2` do.
fn rotate_half_order(data: &MatrixData, in_len: usize, head_dim: usize) -> MatrixData {
    match data {
        MatrixData::F32(weights) => MatrixData::F32(reorder_rows(weights, in_len, head_dim)),
        MatrixData::F16(weights) => MatrixData::F16(reorder_rows(weights, in_len, head_dim)),
        MatrixData::Bf16(weights) => MatrixData::Bf16(reorder_rows(weights, in_len, head_dim)),
        MatrixData::Q8_0 { scales, quants } => MatrixData::Q8_0 {
            scales: reorder_rows(scales, in_len / Q8_0_BLOCK_LEN, head_dim),
            quants: reorder_rows(quants, in_len, head_dim),
        },
        MatrixData::Q4_0 { scales, quants } => MatrixData::Q4_0 {
            scales: reorder_rows(scales, in_len / Q4_0_BLOCK_LEN, head_dim),
            quants: reorder_rows(quants, in_len / 2, head_dim),
        },
    }
}

fn reorder_rows<T: Copy>(rows: &[T], row_len: usize, head_dim: usize) -> Vec<T> {
    let half = head_dim / 2;
    let mut ordered = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(row_len * head_dim) {
        for row in 0..head_dim {
            let stored = 2 * (row % half) + row / half;
            ordered.extend_from_slice(&head[stored * row_len..(stored + 1) * row_len]);
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::reorder_rows;

    #[test]
    fn rows_of_each_head_are_untangled() {
        // Two heads of four rows; a stored row is named after where it belongs.
        let stored = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| [row, row * 10]).concat();
        let wanted: Vec<i32> = (0..8).flat_map(|row| [row, row * 10]).collect();
        assert_eq!(reorder_rows(&stored, 2, 4), wanted);
    }
}
