//! Owns checkpoints with random weights, for figures that depend on the size of a model and not on
//! what it says. Deterministic: the same size gives the same file. Knows the layout of a Hugging
//! Face directory; knows no engine.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use anyhow::Context;
use half::bf16;
use safetensors::{Dtype, View, serialize_to_file};
use serde_json::json;

/// Entries of the micro pair's vocabulary, which every random model shares.
const VOCAB_SIZE: usize = 1024;
/// Positions of the context.
const CONTEXT_LEN: usize = 1024;
/// Width of an attention head.
const HEAD_DIM: usize = 64;

/// Shape of a random Llama.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomModel {
    /// Width; a multiple of 128.
    pub hidden_len: usize,
    /// Layers.
    pub num_layers: usize,
}

impl RandomModel {
    /// Width of the feed-forward part: 8/3 of the model's, as Llama has it, in whole 64s.
    fn ffn_len(self) -> usize {
        (self.hidden_len * 8 / 3).next_multiple_of(64)
    }

    fn kv_len(self) -> usize {
        self.hidden_len / 2
    }

    /// Weights altogether.
    #[must_use]
    pub fn num_weights(self) -> usize {
        self.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    /// Writes `config.json`, `tokenizer.json` and `model.safetensors` into `folder`.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write(self, folder: &Path) -> anyhow::Result<()> {
        let tokenizer =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../models/micro/tokenizer.json").to_owned();
        fs::copy(&tokenizer, folder.join("tokenizer.json")).context(tokenizer)?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_len,
            "intermediate_size": self.ffn_len(),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_len / HEAD_DIM,
            "num_key_value_heads": self.kv_len() / HEAD_DIM,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": CONTEXT_LEN,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
            "vocab_size": VOCAB_SIZE,
            "eos_token_id": 0,
        });
        fs::write(folder.join("config.json"), config.to_string())?;
        let tensors = self.tensors();
        let named = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
        serialize_to_file(named, None, &folder.join("model.safetensors"))?;
        Ok(())
    }

    fn tensors(self) -> Vec<RandomTensor> {
        let (hidden, ffn, kv) = (self.hidden_len, self.ffn_len(), self.kv_len());
        let mut tensors = vec![
            RandomTensor::new("model.embed_tokens.weight", vec![VOCAB_SIZE, hidden]),
            RandomTensor::new("model.norm.weight", vec![hidden]),
        ];
        for layer in 0..self.num_layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![ffn, hidden]),
                ("mlp.up_proj", vec![ffn, hidden]),
                ("mlp.down_proj", vec![hidden, ffn]),
            ] {
                tensors
                    .push(RandomTensor::new(&format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        tensors
    }
}

/// A tensor whose numbers are drawn when they are written.
struct RandomTensor {
    name: String,
    shape: Vec<usize>,
}

impl RandomTensor {
    fn new(name: &str, shape: Vec<usize>) -> Self {
        Self { name: name.to_owned(), shape }
    }
}

impl View for &RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Norms are 1. Matrices are uniform with the variance 1 / inputs, which keeps activations at
    /// the size they came in.
    fn data(&self) -> Cow<'_, [u8]> {
        let count: usize = self.shape.iter().product();
        let one = bf16::ONE.to_le_bytes();
        let &[_, inputs] = self.shape.as_slice() else { return Cow::Owned(one.repeat(count)) };
        let width = (3.0 / inputs as f32).sqrt();
        // FNV-1a of the name, so that every tensor has numbers of its own.
        let mut state = self.name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        let mut bytes = Vec::with_capacity(2 * count);
        for _ in 0..count {
            // Knuth's MMIX constants; the upper bits are good enough for weights.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1 << 24) as f32;
            bytes.extend_from_slice(&bf16::from_f32(width * (2.0 * unit - 1.0)).to_le_bytes());
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}
