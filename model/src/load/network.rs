//! Owns the assembly of typed weights from the tensors of a checked file: which tensors a Llama
//! network has, their names in both formats, their shapes, their format in memory. Knows the file
//! only as names, shapes and numbers.

use std::collections::BTreeSet;

use super::gguf::{GgufFile, ROPE_DIVISORS};
use super::quantize::{dequantize_q8_0, quantize_q8_0};
use super::safetensors::SafetensorsFile;
use super::{LoadOptions, LoadProgress, LoadStage, ParsedConfig, WeightFormat};
use crate::config::LlamaConfig;
use crate::error::{LoadError, tensor};
use crate::weights::{LayerWeights, LlamaWeights, Matrix, MatrixData, Q8_0_BLOCK_LEN};

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

/// A checked file of either format.
pub(super) enum TensorFile<'a> {
    Safetensors(SafetensorsFile<'a>),
    Gguf(GgufFile<'a>),
}

impl TensorFile<'_> {
    fn name_of(&self, role: Role, layer: usize) -> String {
        match self {
            Self::Safetensors(_) => role.hf_name(layer),
            Self::Gguf(_) => role.gguf_name(layer),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(file) => file.shape(name),
            Self::Gguf(file) => file.shape(name),
        }
    }

    fn names(&self) -> Vec<&str> {
        match self {
            Self::Safetensors(file) => file.names().collect(),
            Self::Gguf(file) => file.names().collect(),
        }
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        match self {
            Self::Safetensors(file) => file.stored_bytes(name),
            Self::Gguf(file) => file.stored_bytes(name),
        }
    }

    fn is_q8_0(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(_) => false,
            Self::Gguf(file) => file.is_q8_0(name),
        }
    }

    /// Tensors that hold no weights: what they say is known from the configuration, or read there.
    fn is_known_extra(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(_) => name.ends_with(".rotary_emb.inv_freq"),
            Self::Gguf(_) => name == ROPE_DIVISORS,
        }
    }

    fn read(&self, name: &str) -> Result<MatrixData, LoadError> {
        match self {
            Self::Safetensors(file) => file.read(name).map(MatrixData::F32),
            Self::Gguf(file) => file.read(name),
        }
    }
}

/// Reads all weights. Names, shapes and memory are checked for the whole file before the first
/// tensor is converted. `file_bytes` is what the file itself occupies.
pub(super) fn read(
    file: &TensorFile<'_>,
    parsed: &ParsedConfig,
    options: &LoadOptions,
    file_bytes: u64,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LlamaWeights, LoadError> {
    let config = &parsed.llama;
    let output_name = file.name_of(Role::Output, NO_LAYER);
    let is_tied = parsed.is_tied.unwrap_or(file.shape(&output_name).is_none());
    let repeats_embedding = is_tied && file.shape(&output_name).is_some();
    let total = check_tensors(file, config, !is_tied || repeats_embedding)?;
    check_memory(file, config, options, file_bytes)?;
    let mut reader = Reader { file, config, options, progress, done: 0, total };
    let embedding = reader.matrix(Role::Embedding, NO_LAYER)?;
    let layers = (0..config.num_layers).map(|l| reader.layer(l)).collect::<Result<_, _>>()?;
    let output_norm = reader.norm(Role::OutputNorm, NO_LAYER)?;
    let output = match (is_tied, repeats_embedding) {
        (false, _) => Some(reader.matrix(Role::Output, NO_LAYER)?),
        (true, false) => None,
        (true, true) if reader.matrix(Role::Output, NO_LAYER)? == embedding => None,
        (true, true) => {
            let reason = "config.json ties it to the embedding, but the two differ";
            return Err(LoadError::mismatch(tensor(&output_name), reason));
        }
    };
    Ok(LlamaWeights { embedding, layers, output_norm, output })
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

/// Every tensor of the network is there in its shape, and there is no other. Returns their bytes.
fn check_tensors(
    file: &TensorFile<'_>,
    config: &LlamaConfig,
    has_output: bool,
) -> Result<u64, LoadError> {
    let mut wanted = BTreeSet::new();
    let mut total = 0;
    for (role, layer) in slots(config, has_output) {
        let name = file.name_of(role, layer);
        let Some(shape) = file.shape(&name) else {
            return Err(LoadError::missing(tensor(&name)));
        };
        let expected = role.shape(config);
        if shape != expected {
            let reason = format!("its shape is {shape:?}, the configuration asks for {expected:?}");
            return Err(LoadError::mismatch(tensor(&name), reason));
        }
        total += file.stored_bytes(&name);
        wanted.insert(name);
    }
    for name in file.names() {
        if !wanted.contains(name) && !file.is_known_extra(name) {
            return Err(LoadError::unsupported(tensor(name), "no part of this Llama network"));
        }
    }
    Ok(total)
}

/// Estimates the peak: the file, all weights in memory, the copies of the largest tensor that its
/// conversion makes, and the rotary tables, which a few bytes of configuration can make large.
fn check_memory(
    file: &TensorFile<'_>,
    config: &LlamaConfig,
    options: &LoadOptions,
    file_bytes: u64,
) -> Result<(), LoadError> {
    let has_output = file.shape(&file.name_of(Role::Output, NO_LAYER)).is_some();
    let mut weights = 0u64;
    let mut largest = 0u64;
    for (role, layer) in slots(config, has_output) {
        let name = file.name_of(role, layer);
        let shape = role.shape(config);
        let elements = shape.iter().map(|dim| *dim as u64).product::<u64>();
        let format = options.format.unwrap_or(match file.is_q8_0(&name) {
            true => WeightFormat::Q8_0,
            false => WeightFormat::F32,
        });
        weights += match format {
            WeightFormat::Q8_0 if shape.len() == 2 => elements + elements / 16,
            WeightFormat::Q8_0 | WeightFormat::F32 => elements * 4,
        };
        largest = largest.max(2 * file.stored_bytes(&name) + elements * 4);
    }
    let rotary_tables = config.context_len as u64 * config.head_dim as u64 * 4;
    let needed_bytes = file_bytes + weights + largest + rotary_tables;
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
        match self.stored(&name)? {
            MatrixData::F32(weights) => Ok(weights),
            MatrixData::Q8_0 { scales, quants } => Ok(dequantize_q8_0(&scales, &quants)),
        }
    }

    fn matrix(&mut self, role: Role, layer: usize) -> Result<Matrix, LoadError> {
        let name = self.file.name_of(role, layer);
        let shape = role.shape(self.config);
        let (out_len, in_len) = (shape[0], shape[1]);
        let mut data = self.stored(&name)?;
        let is_gguf = matches!(self.file, TensorFile::Gguf(_));
        if is_gguf && matches!(role, Role::Query | Role::Key) {
            data = rotate_half_order(&data, in_len, self.config.head_dim);
        }
        let data = match (data, self.options.format) {
            (MatrixData::F32(weights), Some(WeightFormat::Q8_0)) => {
                quantized(&name, &weights, in_len)?
            }
            (MatrixData::Q8_0 { scales, quants }, Some(WeightFormat::F32)) => {
                MatrixData::F32(dequantize_q8_0(&scales, &quants))
            }
            (data, Some(_) | None) => data,
        };
        Ok(Matrix { out_len, in_len, data })
    }

    /// A tensor in the file's format, every number finite.
    fn stored(&mut self, name: &str) -> Result<MatrixData, LoadError> {
        let data = self.file.read(name)?;
        check_numbers(name, &data)?;
        self.done += self.file.stored_bytes(name);
        (self.progress)(LoadProgress {
            stage: LoadStage::Weights,
            done_bytes: self.done,
            total_bytes: self.total,
        });
        Ok(data)
    }
}

fn check_numbers(name: &str, data: &MatrixData) -> Result<(), LoadError> {
    let is_finite = match data {
        MatrixData::F32(weights) => weights.iter().all(|weight| weight.is_finite()),
        MatrixData::Q8_0 { scales, .. } => scales.iter().all(|scale| scale.is_finite()),
    };
    if !is_finite {
        return Err(LoadError::malformed(tensor(name), "a weight is infinite or not a number"));
    }
    Ok(())
}

fn quantized(name: &str, weights: &[f32], in_len: usize) -> Result<MatrixData, LoadError> {
    if !in_len.is_multiple_of(Q8_0_BLOCK_LEN) {
        let reason = format!("rows of {in_len} are no multiple of {Q8_0_BLOCK_LEN}, as Q8_0 needs");
        return Err(LoadError::unsupported(tensor(name), reason));
    }
    match quantize_q8_0(weights) {
        Some((scales, quants)) => Ok(MatrixData::Q8_0 { scales, quants }),
        None => Err(LoadError::unsupported(tensor(name), "its weights are too large for Q8_0")),
    }
}

/// Puts query or key rows of a GGUF file into rotate-half order. There, rows `2i` and `2i + 1` of a
/// head turn together; here, rows `i` and `i + head_dim / 2` do.
fn rotate_half_order(data: &MatrixData, in_len: usize, head_dim: usize) -> MatrixData {
    match data {
        MatrixData::F32(weights) => MatrixData::F32(reorder_rows(weights, in_len, head_dim)),
        MatrixData::Q8_0 { scales, quants } => MatrixData::Q8_0 {
            scales: reorder_rows(scales, in_len / Q8_0_BLOCK_LEN, head_dim),
            quants: reorder_rows(quants, in_len, head_dim),
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
