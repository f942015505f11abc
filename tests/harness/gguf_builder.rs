//! Owns the writing of small GGUF files for tests, sound and unsound ones alike. Knows the
//! container and one tiny network; knows nothing of what reads them.

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    /// A 32-bit number.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of 32-bit numbers.
    I32s(Vec<i32>),
    /// An array of 32-bit floats.
    F32s(Vec<f32>),
    /// A type number and the bytes after it, whatever they are.
    Raw(u32, Vec<u8>),
}

/// A tensor as the file describes it.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Innermost dimension first, as the file has them.
    pub dims: Vec<u64>,
    /// Number of the type.
    pub code: u32,
    /// Its data.
    pub bytes: Vec<u8>,
    /// Offset to state; `None` for where the bytes really are.
    pub offset: Option<u64>,
}

/// A file to be.
#[derive(Clone, Debug)]
pub struct GgufBuilder {
    /// The first four bytes.
    pub magic: [u8; 4],
    /// Version of the format.
    pub version: u32,
    /// Number of tensors to state; `None` for the true one.
    pub num_tensors: Option<u64>,
    /// Number of keys to state; `None` for the true one.
    pub num_keys: Option<u64>,
    /// Metadata in file order.
    pub keys: Vec<(String, Value)>,
    /// Tensors in file order.
    pub tensors: Vec<Tensor>,
}

/// Number of the type of 32-bit floats.
pub const TYPE_F32: u32 = 0;
/// Number of the type of half precision.
pub const TYPE_F16: u32 = 1;
/// Number of the type Q4_0.
pub const TYPE_Q4_0: u32 = 2;
/// Number of the type Q8_0.
pub const TYPE_Q8_0: u32 = 8;
/// Number of the type Q4_K.
pub const TYPE_Q4_K: u32 = 12;
/// Number of the type of the upper halves of 32-bit floats.
pub const TYPE_BF16: u32 = 30;
const ALIGNMENT: usize = 32;

/// Vocabulary of the tiny network.
pub const VOCAB: u64 = 12;
/// Width of its residual stream.
pub const HIDDEN: u64 = 32;
/// Width of its feed-forward network.
pub const FFN: u64 = 64;

fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

fn array(code: u32, len: usize, items: Vec<Vec<u8>>) -> Vec<u8> {
    [code.to_le_bytes().to_vec(), (len as u64).to_le_bytes().to_vec(), items.concat()].concat()
}

impl Value {
    fn encode(&self) -> (u32, Vec<u8>) {
        match self {
            Self::U32(n) => (4, n.to_le_bytes().to_vec()),
            Self::F32(x) => (6, x.to_le_bytes().to_vec()),
            Self::Bool(b) => (7, vec![u8::from(*b)]),
            Self::Text(t) => (8, text(t.as_bytes())),
            Self::Texts(t) => {
                (9, array(8, t.len(), t.iter().map(|t| text(t.as_bytes())).collect()))
            }
            Self::I32s(n) => {
                (9, array(5, n.len(), n.iter().map(|n| n.to_le_bytes().to_vec()).collect()))
            }
            Self::F32s(x) => {
                (9, array(6, x.len(), x.iter().map(|x| x.to_le_bytes().to_vec()).collect()))
            }
            Self::Raw(code, bytes) => (*code, bytes.clone()),
        }
    }
}

/// Strings from literals.
#[must_use]
pub fn texts(items: &[&str]) -> Value {
    Value::Texts(items.iter().map(|item| (*item).to_owned()).collect())
}

impl GgufBuilder {
    /// A sound file: one layer, tied, byte-level vocabulary of `VOCAB` tokens, one of them special.
    #[must_use]
    pub fn tiny() -> Self {
        Self::network(HIDDEN, FFN)
    }

    /// The same with other widths: two heads share the residual stream of `hidden`, and the keys of
    /// one.
    #[must_use]
    pub fn network(hidden: u64, ffn: u64) -> Self {
        let head_dim = hidden / 2;
        let mut file = Self {
            magic: *b"GGUF",
            version: 3,
            num_tensors: None,
            num_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
        };
        file.set("general.architecture", Value::Text("llama".to_owned()));
        for (key, value) in [
            ("llama.context_length", 64),
            ("llama.embedding_length", hidden as u32),
            ("llama.block_count", 1),
            ("llama.feed_forward_length", ffn as u32),
            ("llama.attention.head_count", 2),
            ("llama.attention.head_count_kv", 1),
            ("llama.rope.dimension_count", head_dim as u32),
            ("tokenizer.ggml.eos_token_id", 0),
        ] {
            file.set(key, Value::U32(value));
        }
        file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        file.set("tokenizer.ggml.model", Value::Text("gpt2".to_owned()));
        file.set("tokenizer.ggml.pre", Value::Text("gpt-2".to_owned()));
        let tokens = ["<end>", "a", "b", "c", "Ġ", "Ċ", "ab", "Ġa", "1", "2", "!", "Ã"];
        file.set("tokenizer.ggml.tokens", texts(&tokens));
        let mut kinds = vec![1; tokens.len()];
        kinds[0] = 3;
        file.set("tokenizer.ggml.token_type", Value::I32s(kinds));
        file.set("tokenizer.ggml.merges", texts(&["a b", "Ġ a"]));
        file.tensor("token_embd.weight", &[hidden, VOCAB]);
        for (name, dims) in [
            ("attn_norm", &[hidden][..]),
            ("attn_q", &[hidden, hidden]),
            ("attn_k", &[hidden, head_dim]),
            ("attn_v", &[hidden, head_dim]),
            ("attn_output", &[hidden, hidden]),
            ("ffn_norm", &[hidden]),
            ("ffn_gate", &[hidden, ffn]),
            ("ffn_up", &[hidden, ffn]),
            ("ffn_down", &[ffn, hidden]),
        ] {
            file.tensor(&format!("blk.0.{name}.weight"), dims);
        }
        file.tensor("output_norm.weight", &[hidden]);
        file
    }

    /// Sets a key, in its old place where it has one.
    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        match self.keys.iter_mut().find(|(name, _)| name == key) {
            Some(entry) => entry.1 = value,
            None => self.keys.push((key.to_owned(), value)),
        }
        self
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(name, _)| name != key);
        self
    }

    /// Appends an F32 tensor of small numbers.
    pub fn tensor(&mut self, name: &str, dims: &[u64]) -> &mut Self {
        let len = dims.iter().product::<u64>();
        let bytes = (0..len).flat_map(|i| ((i % 7) as f32 * 0.1 - 0.3).to_le_bytes()).collect();
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            code: TYPE_F32,
            bytes,
            offset: None,
        });
        self
    }

    /// A tensor to spoil.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a known name")
    }

    /// Gives a tensor another type and the bytes that it has in it.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn retype(&mut self, name: &str, code: u32, bytes: Vec<u8>) -> &mut Self {
        let tensor = self.tensor_mut(name);
        (tensor.code, tensor.bytes) = (code, bytes);
        self
    }

    /// The file's bytes.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let (mut header, data) = self.header_and_data();
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        [header, data].concat()
    }

    /// Bytes before the padding that precedes tensor data.
    #[must_use]
    pub fn header_len(&self) -> usize {
        self.header_and_data().0.len()
    }

    fn header_and_data(&self) -> (Vec<u8>, Vec<u8>) {
        let mut header = self.magic.to_vec();
        header.extend(self.version.to_le_bytes());
        header.extend(self.num_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        header.extend(self.num_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            let (code, bytes) = value.encode();
            header.extend(text(key.as_bytes()));
            header.extend(code.to_le_bytes());
            header.extend(bytes);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            header.extend(text(tensor.name.as_bytes()));
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| header.extend(dim.to_le_bytes()));
            header.extend(tensor.code.to_le_bytes());
            header.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        (header, data)
    }
}
