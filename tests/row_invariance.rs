//! Proves the promise of the forward pass: the bits of a row's logits depend on the tokens of its
//! own sequence and on nothing else. The oracle is the plain twin with one thread, a fresh pool,
//! one sequence, one token at a time. Held against it: any mix of rows, any chunking, shuffled
//! block tables, blocks that hold garbage and NaN, every implementation, one to three threads.

use std::sync::Arc;

use half::{bf16, f16};
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::config::{LlamaConfig, RopeScaling};
use slipstream_model::forward::{Forward, ForwardError, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::packed::{ModelError, PackedLlama};
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_model::weights::{LayerWeights, LlamaWeights, Matrix, MatrixData, Q8_0_BLOCK_LEN};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

const SEED: u64 = 20_261_122;
const VOCAB: usize = 67;
/// In all networks but [`Kind::TiedQ8`] ones, the embedding of this token is NaN.
const NAN_TOKEN: TokenId = TokenId(VOCAB as u32 - 1);

/// See [`loud_model`].
const LOUD_TOKEN: TokenId = TokenId(0);

/// What the network is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    F16,
    Bf16,
    Q4,
    Q8,
    /// Q8_0 with a tied output.
    TiedQ8,
}

fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: VOCAB,
        hidden_len: 64,
        ffn_len: 96,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 24,
        context_len: 640,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rope_freq_divisors: Vec::new(),
        eos_ids: Vec::new(),
    }
}

fn floats(rng: &mut Rng, len: usize, size: f64) -> Vec<f32> {
    (0..len).map(|_| ((rng.unit() * 2.0 - 1.0) * size) as f32).collect()
}

fn matrix(rng: &mut Rng, kind: Kind, out_len: usize, in_len: usize) -> Matrix {
    let size = 3.0 / (in_len as f64).sqrt();
    let num = out_len * in_len;
    let data = match kind {
        Kind::F32 => MatrixData::F32(floats(rng, num, size)),
        Kind::F16 => {
            MatrixData::F16(floats(rng, num, size).into_iter().map(f16::from_f32).collect())
        }
        Kind::Bf16 => {
            MatrixData::Bf16(floats(rng, num, size).into_iter().map(bf16::from_f32).collect())
        }
        Kind::Q4 => {
            let scales = scales(rng, num, size / 8.0);
            let quants = (0..num / 2).map(|_| rng.bits() as u8).collect();
            MatrixData::Q4_0 { scales, quants }
        }
        Kind::Q8 | Kind::TiedQ8 => {
            let scales = scales(rng, num, size / 127.0);
            let quants = (0..num).map(|_| rng.bits() as i8).collect();
            MatrixData::Q8_0 { scales, quants }
        }
    };
    Matrix { out_len, in_len, data }
}

/// Scales of the blocks of `num` weights.
fn scales(rng: &mut Rng, num: usize, size: f64) -> Vec<f16> {
    (0..num / Q8_0_BLOCK_LEN).map(|_| f16::from_f64((0.5 + rng.unit()) * size)).collect()
}

fn layer(rng: &mut Rng, kind: Kind, config: &LlamaConfig) -> LayerWeights {
    let LlamaConfig { hidden_len, ffn_len, .. } = *config;
    LayerWeights {
        attention_norm: floats(rng, hidden_len, 1.5),
        query: matrix(rng, kind, config.query_len(), hidden_len),
        key: matrix(rng, kind, config.kv_len(), hidden_len),
        value: matrix(rng, kind, config.kv_len(), hidden_len),
        attention_output: matrix(rng, Kind::F32, hidden_len, config.query_len()),
        ffn_norm: floats(rng, hidden_len, 1.5),
        gate: matrix(rng, kind, ffn_len, hidden_len),
        up: matrix(rng, kind, ffn_len, hidden_len),
        down: matrix(rng, kind, hidden_len, ffn_len),
    }
}

fn weights(kind: Kind, config: &LlamaConfig) -> LlamaWeights {
    let mut rng = Rng::new(SEED);
    let rng = &mut rng;
    let mut embedding = matrix(rng, kind, VOCAB, config.hidden_len);
    let nan_row = NAN_TOKEN.index();
    match &mut embedding.data {
        MatrixData::F32(data) => data[nan_row * config.hidden_len] = f32::NAN,
        MatrixData::Q8_0 { scales, .. } if kind == Kind::Q8 => {
            scales[nan_row * config.hidden_len / Q8_0_BLOCK_LEN] = f16::NAN;
        }
        MatrixData::Q8_0 { .. } => {}
        MatrixData::Q4_0 { scales, .. } => {
            scales[nan_row * config.hidden_len / Q8_0_BLOCK_LEN] = f16::NAN;
        }
        MatrixData::F16(data) => data[nan_row * config.hidden_len] = f16::NAN,
        MatrixData::Bf16(data) => data[nan_row * config.hidden_len] = bf16::NAN,
    }
    LlamaWeights {
        embedding,
        layers: (0..config.num_layers).map(|_| layer(rng, kind, config)).collect(),
        output_norm: floats(rng, config.hidden_len, 1.5),
        output: (kind != Kind::TiedQ8).then(|| matrix(rng, kind, VOCAB, config.hidden_len)),
    }
}

fn model(kind: Kind) -> Arc<PackedLlama> {
    Arc::new(PackedLlama::pack(config(), weights(kind, &config())).unwrap())
}

fn transformer(model: &Arc<PackedLlama>, isa: Isa, threads: usize, blocks: usize) -> Transformer {
    let kv_type = KvType::F32;
    network(model, TransformerOptions { num_blocks: blocks, threads, isa, kv_type })
}

fn network(model: &Arc<PackedLlama>, options: TransformerOptions) -> Transformer {
    let mut transformer = Transformer::new(Arc::clone(model), options).unwrap();
    // The test's products are small: without this no team would ever share one.
    transformer.share_products_from(0);
    transformer.share_attention_from(0, 2000);
    transformer
}

fn tokens(rng: &mut Rng, len: usize) -> Vec<TokenId> {
    (0..len).map(|_| TokenId(rng.below(VOCAB - 1) as u32)).collect()
}

fn segment<'a>(
    tokens: &'a [TokenId],
    start: usize,
    block_table: &'a [BlockId],
) -> SegmentInput<'a> {
    SegmentInput { tokens, start, block_table, logits_from: 0, owner: 0, scope: 0 }
}

fn blocks(ids: std::ops::Range<usize>) -> Vec<BlockId> {
    ids.map(|id| BlockId(id as u32)).collect()
}

/// Bits of the logits of every position, one token at a time.
fn oracle(model: &Arc<PackedLlama>, tokens: &[TokenId]) -> Vec<Vec<u32>> {
    oracle_with(model, KvType::F32, tokens)
}

fn oracle_with(model: &Arc<PackedLlama>, kv_type: KvType, tokens: &[TokenId]) -> Vec<Vec<u32>> {
    let num_blocks = tokens.len().div_ceil(BLOCK_LEN);
    let mut network =
        network(model, TransformerOptions { num_blocks, threads: 1, isa: Isa::Plain, kv_type });
    let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
    let table = blocks(0..num_blocks);
    let mut rows = Vec::new();
    for position in 0..tokens.len() {
        batch.clear();
        batch.push(segment(&tokens[position..=position], position, &table));
        network.forward(&batch, &mut logits).unwrap();
        rows.push(bits(logits.row(0)));
    }
    rows
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|logit| logit.to_bits()).collect()
}

/// Leaves garbage, and NaN where the network has a token for it, in every slot.
fn spoil(network: &mut Transformer, rng: &mut Rng, kind: Kind) {
    let mut batch = RaggedBatch::new();
    for block in 0..network.limits().num_blocks {
        let mut garbage = tokens(rng, BLOCK_LEN);
        if kind != Kind::TiedQ8 && block % 3 > 0 {
            garbage[rng.below(BLOCK_LEN)] = NAN_TOKEN;
        }
        batch.push(segment(&garbage, 0, &[BlockId(block as u32)]));
    }
    network.forward(&batch, &mut Logits::new()).unwrap();
}

struct Stream {
    tokens: Vec<TokenId>,
    wanted: Vec<Vec<u32>>,
    table: Vec<BlockId>,
    computed_len: usize,
}

/// Moves all streams to their end in random chunks and company; every row must have its bits.
fn drive(network: &mut Transformer, streams: &mut [Stream], rng: &mut Rng, label: &str) {
    let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
    while streams.iter().any(|stream| stream.computed_len < stream.tokens.len()) {
        batch.clear();
        let mut rows = Vec::new();
        let first = rng.below(streams.len());
        for index in (first..streams.len()).chain(0..first) {
            let stream = &mut streams[index];
            let left = stream.tokens.len() - stream.computed_len;
            let chunk_len = left.min(*rng.pick(&[0, 1, 1, 2, 3, 4, 5, 9, 33, 150]));
            if chunk_len == 0 {
                continue;
            }
            let start = stream.computed_len;
            let logits_from = if rng.one_in(3) { rng.below(chunk_len + 1) } else { 0 };
            batch.push(SegmentInput {
                tokens: &stream.tokens[start..start + chunk_len],
                start,
                block_table: &stream.table,
                logits_from,
                owner: index as u64,
                scope: 0,
            });
            rows.extend((start + logits_from..start + chunk_len).map(|position| (index, position)));
            stream.computed_len += chunk_len;
        }
        network.forward(&batch, &mut logits).unwrap();
        assert_eq!(logits.num_rows(), rows.len());
        for (row, &(index, position)) in rows.iter().enumerate() {
            let wanted = &streams[index].wanted[position];
            assert!(bits(logits.row(row)) == *wanted, "{label}: stream {index} at {position}");
        }
    }
}

fn check_company(kind: Kind, kv_type: KvType, lens: &[usize]) {
    let model = model(kind);
    let rng = Rng::new(SEED + 1);
    let mut token_rng = rng.fork(1);
    let sequences: Vec<_> = lens.iter().map(|&len| tokens(&mut token_rng, len)).collect();
    let wanted: Vec<_> =
        sequences.iter().map(|tokens| oracle_with(&model, kv_type, tokens)).collect();
    let num_blocks = lens.iter().map(|len| len.div_ceil(BLOCK_LEN)).sum::<usize>() + 3;
    for isa in Isa::available() {
        for threads in 1..=3 {
            let mut rng = rng.fork(threads as u64);
            let name = isa.name();
            let label = format!("{kind:?} {kv_type:?} {name} {threads} threads, seed {SEED}");
            let options = TransformerOptions { num_blocks, threads, isa, kv_type };
            let mut network = network(&model, options);
            spoil(&mut network, &mut rng, kind);
            let mut free = blocks(0..num_blocks);
            let mut streams = Vec::new();
            for (tokens, wanted) in sequences.iter().zip(&wanted) {
                let mut take = || free.swap_remove(rng.below(free.len()));
                let table = (0..tokens.len().div_ceil(BLOCK_LEN)).map(|_| take()).collect();
                let (tokens, wanted) = (tokens.clone(), wanted.clone());
                streams.push(Stream { tokens, wanted, table, computed_len: 0 });
            }
            drive(&mut network, &mut streams, &mut rng, &label);
        }
    }
}

#[test]
fn company_chunks_blocks_threads_and_isa_change_no_bit() {
    timed("row invariance, f32 and Q8_0", 8.0, || {
        check_company(Kind::F32, KvType::F32, &[3, 17, 64, 300]);
        check_company(Kind::Q8, KvType::F32, &[1, 16, 130, 530]);
        check_company(Kind::TiedQ8, KvType::F32, &[40, 41, 257]);
        check_company(Kind::Q8, KvType::F16, &[2, 33, 270]);
        check_company(Kind::Q4, KvType::F32, &[1, 35, 262]);
        check_company(Kind::F16, KvType::F32, &[4, 60]);
        check_company(Kind::Bf16, KvType::F16, &[5, 50]);
    });
}

#[test]
fn a_row_is_the_same_in_batches_of_1_to_64_rows() {
    timed("row invariance, 1 to 64 rows", 4.0, || {
        for kind in [Kind::F32, Kind::Q8] {
            let model = model(kind);
            let mut rng = Rng::new(SEED + 2);
            let sequences: Vec<_> = (0..64).map(|_| tokens(&mut rng, 1)).collect();
            let wanted: Vec<_> = sequences.iter().map(|one| oracle(&model, one)).collect();
            let ways = [(Isa::Plain, 2), (Isa::detect(), 1), (Isa::detect(), 2)];
            for (isa, threads) in ways {
                let mut network = transformer(&model, isa, threads, 64);
                let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
                for num_rows in 1..=64 {
                    batch.clear();
                    for (block, tokens) in sequences[..num_rows].iter().enumerate() {
                        batch.push(segment(tokens, 0, &[BlockId(block as u32)]));
                    }
                    network.forward(&batch, &mut logits).unwrap();
                    for (row, wanted) in wanted[..num_rows].iter().enumerate() {
                        let found = bits(logits.row(row));
                        assert!(found == wanted[0], "{kind:?} row {row} of {num_rows}");
                    }
                }
            }
        }
    });
}

#[test]
fn nan_stays_in_its_row_and_what_follows_it() {
    for kind in [Kind::F32, Kind::Q8] {
        let model = model(kind);
        let mut rng = Rng::new(SEED + 3);
        let healthy = tokens(&mut rng, 20);
        let wanted = oracle(&model, &healthy);
        let mut sick = healthy.clone();
        sick[5] = NAN_TOKEN;
        for isa in Isa::available() {
            let mut network = transformer(&model, isa, 2, 4);
            let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
            batch.push(segment(&sick, 0, &blocks(0..2)));
            batch.push(segment(&healthy, 0, &blocks(2..4)));
            network.forward(&batch, &mut logits).unwrap();
            for (position, wanted) in wanted.iter().enumerate() {
                assert!(bits(logits.row(20 + position)) == *wanted, "a neighbour suffers");
                if position < 5 {
                    assert!(bits(logits.row(position)) == *wanted, "the past changes");
                } else {
                    assert!(logits.row(position).iter().all(|x| x.is_nan()), "NaN is lost");
                }
            }
        }
    }
}

/// A network whose first layer has values beyond half precision for [`LOUD_TOKEN`] alone.
fn loud_model() -> Arc<PackedLlama> {
    let mut weights = weights(Kind::F32, &config());
    let hidden_len = config().hidden_len;
    let (MatrixData::F32(embedding), MatrixData::F32(values)) =
        (&mut weights.embedding.data, &mut weights.layers[0].value.data)
    else {
        panic!("the network is in f32");
    };
    for (token, row) in embedding.chunks_exact_mut(hidden_len).enumerate() {
        row[0] = if token == LOUD_TOKEN.index() { 1.0 } else { 0.0 };
    }
    values.chunks_exact_mut(hidden_len).for_each(|row| row[0] = 1e6);
    weights.layers[0].attention_norm[0] = 1.0;
    Arc::new(PackedLlama::pack(config(), weights).unwrap())
}

#[test]
fn values_beyond_half_precision_are_a_fault_of_their_sequence_alone() {
    let model = loud_model();
    let mut rng = Rng::new(SEED + 5);
    let mut quiet = tokens(&mut rng, 20);
    quiet.iter_mut().for_each(|token| token.0 = token.0.max(LOUD_TOKEN.0 + 1));
    let mut loud = quiet.clone();
    loud[7] = LOUD_TOKEN;
    let wanted = oracle_with(&model, KvType::F16, &quiet);
    for isa in Isa::available() {
        for kv_type in [KvType::F32, KvType::F16] {
            let options = TransformerOptions { num_blocks: 4, threads: 2, isa, kv_type };
            let mut network = network(&model, options);
            let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
            batch.push(segment(&loud, 0, &blocks(0..2)));
            batch.push(segment(&quiet, 0, &blocks(2..4)));
            network.forward(&batch, &mut logits).unwrap();
            for (position, wanted) in wanted.iter().enumerate() {
                let (loud, quiet) = (logits.row(position), logits.row(20 + position));
                if kv_type == KvType::F32 {
                    assert!(loud.iter().chain(quiet).all(|x| x.is_finite()), "f32 holds them");
                    continue;
                }
                assert!(bits(quiet) == *wanted, "a neighbour suffers");
                let is_nan = loud.iter().all(|x| x.is_nan());
                assert_eq!(is_nan, position >= 7, "{} at {position}", isa.name());
            }
        }
    }
}

#[test]
fn sequences_may_share_a_prefix() {
    let model = model(Kind::Q8);
    let mut rng = Rng::new(SEED + 4);
    let prefix = tokens(&mut rng, 2 * BLOCK_LEN);
    let mut network = transformer(&model, Isa::detect(), 2, 4);
    let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
    batch.push(SegmentInput { logits_from: prefix.len(), ..segment(&prefix, 0, &blocks(0..2)) });
    network.forward(&batch, &mut logits).unwrap();
    assert_eq!(logits.num_rows(), 0);
    batch.clear();
    let tails = [tokens(&mut rng, 3), tokens(&mut rng, 5)];
    for (tail, own) in tails.iter().zip(2..) {
        let table = [BlockId(0), BlockId(1), BlockId(own)];
        batch.push(segment(tail, prefix.len(), &table));
    }
    network.forward(&batch, &mut logits).unwrap();
    let wanted = tails
        .iter()
        .flat_map(|tail| oracle(&model, &[&prefix[..], tail].concat()).split_off(prefix.len()));
    for (row, wanted) in wanted.enumerate() {
        assert!(bits(logits.row(row)) == wanted, "row {row}");
    }
}

#[test]
fn bad_batches_are_refused_before_anything_is_touched() {
    let model = model(Kind::F32);
    let mut network = transformer(&model, Isa::detect(), 1, 41);
    let good = vec![TokenId(1); 20];
    let (mut batch, mut logits) = (RaggedBatch::new(), Logits::new());
    batch.push(segment(&good, 0, &blocks(0..2)));
    network.forward(&batch, &mut logits).unwrap();
    let before = bits(logits.row(19));
    let table = blocks(0..41);
    let unknown = TokenId(VOCAB as u32);
    let long = vec![TokenId(2); 641];
    let cases: [(&[TokenId], usize, &[BlockId], &str); 4] = [
        (&[unknown], 0, &table, "token id 67 at row 1 is outside the vocabulary of 67"),
        (&[TokenId(3)], 0, &[BlockId(41)], "block 41 is outside the KV pool of 41 blocks"),
        (&[TokenId(3)], 640, &table, "position 640 lies past the context of 640"),
        (&long, 0, &table, "position 640 lies past the context of 640"),
    ];
    for (tokens, start, table, message) in cases {
        batch.clear();
        batch.push(segment(&[TokenId(4)], 0, &[BlockId(0)]));
        batch.push(segment(tokens, start, table));
        let error: ForwardError = network.forward(&batch, &mut logits).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    batch.clear();
    batch.push(segment(&good[19..], 19, &blocks(0..2)));
    network.forward(&batch, &mut logits).unwrap();
    assert!(bits(logits.row(0)) == before, "a refused batch left something behind");
    batch.clear();
    network.forward(&batch, &mut logits).unwrap();
    assert_eq!(logits.num_rows(), 0);
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let refused = |config: LlamaConfig, weights: LlamaWeights| {
        PackedLlama::pack(config, weights).map(drop).unwrap_err()
    };
    let base = || weights(Kind::Q8, &config());
    let mut wrong = base();
    wrong.layers[1].down.out_len = 32;
    let error = refused(config(), wrong).to_string();
    assert_eq!(error, "tensor `layers.1.down` has [32, 96]; the configuration needs [64, 96]");
    let mut wrong = base();
    wrong.layers[0].ffn_norm.pop();
    let error = refused(config(), wrong).to_string();
    assert!(error.starts_with("tensor `layers.0.ffn_norm` has 63 numbers"), "{error}");
    let mut wrong = base();
    wrong.layers.pop();
    assert!(matches!(refused(config(), wrong), ModelError::NumLayers { found: 1, expected: 2 }));
    let narrow = LlamaConfig { ffn_len: 100, ..config() };
    let mut wrong = weights(Kind::F32, &narrow);
    let scales = vec![f16::ONE; 200];
    wrong.layers[0].down.data = MatrixData::Q8_0 { scales, quants: vec![1; 6400] };
    let error = refused(narrow, wrong).to_string();
    assert!(error.contains("`layers.0.down` is quantised with rows of 100 numbers"), "{error}");
    let heads = LlamaConfig { head_dim: 12, ..config() };
    assert!(refused(heads, base()).to_string().starts_with("head_dim is 12"));
    let kv_type = KvType::F32;
    let options =
        TransformerOptions { num_blocks: usize::MAX / 8, threads: 1, isa: Isa::Plain, kv_type };
    let error = Transformer::new(model(Kind::F32), options).map(drop).unwrap_err();
    assert!(matches!(error, ModelError::OutOfMemory { .. }), "{error}");
}
