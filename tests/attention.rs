//! Proves attention: every implementation of its kernels that this CPU has equals the plain twin
//! bit for bit, in single and half precision; half precision is rounded as promised; and the
//! attention of a row has the same bits however the rows of a step are cut into tiles and splits,
//! for any company, team and bound on what waits to be merged.

use half::f16;
use slipstream_model::attention::{Attention, AttentionScratch, RowPlace};
use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::config::{LlamaConfig, RopeScaling};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};
use slipstream_model::kernels::attention::{
    self, KvBlock, KvNumbers, Probabilities, Queries, SCORE_STRIDE, SUM_EXTRA,
};
use slipstream_model::kernels::team::Team;
use slipstream_model::kernels::{Isa, SPLIT_LEN};
use slipstream_model::kv_pool::{KvPool, KvPoolOptions, KvType, Slot};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

use slipstream_tests::kernel_checks::{check, floats};

const SEED: u64 = 20_261_121;

/// One block of numbers in both precisions, the same numbers in both.
struct Block {
    wide: Vec<f32>,
    halves: Vec<f16>,
}

impl Block {
    fn random(rng: &mut Rng, head_dim: usize, odd_in: usize) -> Self {
        let wide = floats(rng, BLOCK_LEN * head_dim, odd_in);
        let halves: Vec<f16> = wide.iter().map(|&number| f16::from_f32(number)).collect();
        Self { wide: halves.iter().map(|half| half.to_f32()).collect(), halves }
    }

    /// Both precisions; each fetches itself, which must not matter.
    fn both(&self) -> [KvBlock<'_>; 2] {
        let (wide, halves) = (KvNumbers::F32(&self.wide), KvNumbers::F16(&self.halves));
        [KvBlock { now: wide, next: wide }, KvBlock { now: halves, next: halves }]
    }
}

#[test]
fn kernels_equal_their_twins_in_both_precisions() {
    timed("attention kernels", 3.0, || {
        let mut rng = Rng::new(SEED);
        for head_dim in (8..=136).step_by(8).chain([200, 256]) {
            for len in 1..=BLOCK_LEN {
                let odd_in = [0, 0, 500][len % 3];
                let num = 1 + (len + head_dim / 8) % 6;
                let column = BLOCK_LEN * rng.below(SPLIT_LEN / BLOCK_LEN);
                let numbers = floats(&mut rng, num * head_dim, odd_in);
                let block = Block::random(&mut rng, head_dim, odd_in);
                let queries = Queries { numbers: &numbers, head_dim, scale: 0.25, column };
                let scores = |keys: KvBlock<'_>, isa: Isa| {
                    let mut out = vec![7.0; num * SCORE_STRIDE];
                    attention::scores(isa, &queries, keys, &mut out);
                    out
                };
                // The plain twin in single precision is what both precisions must give.
                let wide = block.both()[0];
                let keys = |isa| block.both()[usize::from(isa != Isa::Plain)];
                check(&format!("scores {num} x {head_dim}"), SEED, |isa| scores(wide, isa));
                check(&format!("f16 scores {num} x {head_dim}"), SEED, |isa| {
                    scores(keys(isa), isa)
                });
                let halves = scores(block.both()[1], Isa::Plain);
                check(&format!("plain f16 scores {num} x {head_dim}"), SEED, |isa| match isa {
                    Isa::Plain => scores(wide, isa),
                    _ => halves.clone(),
                });
                let numbers = floats(&mut rng, num * SCORE_STRIDE, odd_in);
                let start = floats(&mut rng, num * (head_dim + SUM_EXTRA), 0);
                let weights = Probabilities { numbers: &numbers, column, len, head_dim };
                let sums = |values: KvBlock<'_>, isa: Isa| {
                    let mut out = start.clone();
                    attention::accumulate(isa, &weights, values, &mut out);
                    out
                };
                let what = format!("sums {num} x {head_dim} of {len}");
                check(&what, SEED, |isa| sums(wide, isa));
                check(&format!("f16 {what}"), SEED, |isa| sums(keys(isa), isa));
                let halves = sums(block.both()[1], Isa::Plain);
                check(&format!("plain f16 {what}"), SEED, |isa| match isa {
                    Isa::Plain => sums(wide, isa),
                    _ => halves.clone(),
                });
            }
        }
    });
}

#[test]
fn softmax_equals_its_twin() {
    let mut rng = Rng::new(SEED + 1);
    for len in 1..=SPLIT_LEN {
        let x = floats(&mut rng, len, [0, 0, 100][len % 3]);
        check(&format!("softmax {len}"), SEED, |isa| {
            let mut scores: Vec<f32> = x.iter().map(|x| x * 9.0).collect();
            let sum = attention::softmax(isa, &mut scores);
            scores.extend([sum.max, sum.sum]);
            scores
        });
    }
}

#[test]
fn half_precision_is_rounded_to_the_nearest_and_too_large_is_nan() {
    timed("attention narrow", 2.0, || {
        let mut numbers: Vec<f32> =
            (0..=u32::MAX / 4099).map(|i| f32::from_bits(i * 4099)).collect();
        // Every half-precision number, what lies between two of them, and both sides of that.
        for bits in 0..0x7C00_u16 {
            let [here, next] = [bits, bits + 1].map(|bits| f16::from_bits(bits).to_f64());
            let tie = if next.is_finite() { (here + next) / 2.0 } else { 65520.0 } as f32;
            let near = [tie, tie.next_up(), tie.next_down(), here as f32];
            numbers.extend(near.into_iter().flat_map(|number| [number, -number]));
        }
        let narrow = |isa| {
            let mut out = vec![f16::ZERO; numbers.len()];
            attention::narrow(isa, &numbers, &mut out);
            out
        };
        check("narrow", SEED, |isa| narrow(isa).iter().map(|half| half.to_f32()).collect());
        for (&number, half) in numbers.iter().zip(narrow(Isa::Plain)) {
            if number.is_nan() || number.abs() >= 65520.0 {
                assert!(half.is_nan(), "{number:e} became {half:e}");
                continue;
            }
            let error = (half.to_f64() - f64::from(number)).abs();
            for bits in [half.to_bits().wrapping_sub(1), half.to_bits() + 1] {
                let other = f16::from_bits(bits).to_f64();
                let further = (other - f64::from(number)).abs();
                let is_even = half.to_bits() % 2 == 0;
                let is_best = further > error || (further == error && is_even);
                assert!(is_best || !other.is_finite(), "{number:e} became {half:e}");
            }
        }
    });
}

/// Shape of the heads.
#[derive(Clone, Copy, Debug)]
struct Heads {
    num_kv: usize,
    group_len: usize,
    head_dim: usize,
}

/// A pool with the keys and values of some sequences, and queries for all of their positions.
struct World {
    heads: Heads,
    pool: KvPool,
    tables: Vec<Vec<BlockId>>,
    /// `[sequences][positions, heads, head_dim]`.
    queries: Vec<Vec<f32>>,
}

impl World {
    fn random(rng: &mut Rng, heads: Heads, kv_type: KvType, lens: &[usize]) -> Self {
        let Heads { num_kv, group_len, head_dim } = heads;
        let config = LlamaConfig {
            vocab_size: 8,
            hidden_len: 8,
            ffn_len: 8,
            num_layers: 2,
            num_heads: num_kv * group_len,
            num_kv_heads: num_kv,
            head_dim,
            context_len: 2048,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            rope_freq_divisors: Vec::new(),
            eos_ids: Vec::new(),
        };
        let num_blocks = lens.iter().map(|len| len.div_ceil(BLOCK_LEN)).sum();
        let options = KvPoolOptions { num_blocks, kv_type, isa: Isa::detect() };
        let mut pool = KvPool::new(&config, options).unwrap();
        let nan = vec![f32::NAN; num_kv * head_dim];
        let mut free: Vec<BlockId> = (0..num_blocks).map(|id| BlockId(id as u32)).collect();
        for &block in &free {
            (0..BLOCK_LEN).for_each(|offset| pool.write(1, Slot { block, offset }, &nan, &nan));
        }
        let (mut tables, mut queries) = (Vec::new(), Vec::new());
        for &len in lens {
            let mut take = || free.swap_remove(rng.below(free.len()));
            let table: Vec<BlockId> = (0..len.div_ceil(BLOCK_LEN)).map(|_| take()).collect();
            for position in 0..len {
                let keys = floats(rng, num_kv * head_dim, 0);
                let values = floats(rng, num_kv * head_dim, 0);
                pool.write(1, Slot::of(position, &table), &keys, &values);
            }
            tables.push(table);
            queries.push(floats(rng, len * num_kv * group_len * head_dim, 0));
        }
        Self { heads, pool, tables, queries }
    }

    fn row_len(&self) -> usize {
        self.heads.num_kv * self.heads.group_len * self.heads.head_dim
    }

    /// Attention of rows of sequences: (sequence, first position, rows).
    fn run(&self, isa: Isa, rows: &[(usize, usize, usize)], by: &mut Worker) -> Vec<f32> {
        let (mut batch, mut places, mut queries) = (RaggedBatch::new(), Vec::new(), Vec::new());
        for (segment, &(sequence, start, num_rows)) in rows.iter().enumerate() {
            let tokens = vec![TokenId(0); num_rows];
            let block_table = &self.tables[sequence];
            let (logits_from, owner) = (0, 0);
            batch.push(SegmentInput {
                tokens: &tokens,
                start,
                block_table,
                logits_from,
                owner,
                scope: 0,
            });
            let positions = start..start + num_rows;
            places.extend(positions.map(|position| RowPlace { segment, position }));
            let numbers = start * self.row_len()..(start + num_rows) * self.row_len();
            queries.extend_from_slice(&self.queries[sequence][numbers]);
        }
        let mut out = vec![7.0; queries.len()];
        let attention = Attention {
            isa,
            pool: &self.pool,
            layer: 1,
            batch: &batch,
            places: &places,
            queries: &queries,
            head_dim: self.heads.head_dim,
            group_len: self.heads.group_len,
            scratch: &mut by.scratch,
        };
        attention.run(&mut by.team, &mut out);
        out
    }
}

struct Worker {
    team: Team,
    scratch: AttentionScratch,
}

impl Worker {
    fn new(threads: usize) -> Self {
        Self { team: Team::new(threads).unwrap(), scratch: AttentionScratch::default() }
    }
}

fn check_cuts(heads: Heads, kv_type: KvType, rng: &mut Rng) {
    let lens = [1, 15, 40, 256, 300, 530, 900];
    let world = World::random(rng, heads, kv_type, &lens);
    let mut alone = Worker::new(1);
    let mut wanted: Vec<Vec<Option<Vec<u32>>>> = lens.iter().map(|&len| vec![None; len]).collect();
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    // Rows of one sequence, then all sequences at their ends, then a mix.
    let mut steps: Vec<Vec<(usize, usize, usize)>> =
        (1..=17).map(|num_rows| vec![(4, 300 - num_rows, num_rows)]).collect();
    steps.extend([vec![(6, 600, 300)], vec![(6, 899, 1)], vec![(5, 250, 12)]]);
    steps.push((0..lens.len()).map(|sequence| (sequence, lens[sequence] - 1, 1)).collect());
    for _ in 0..4 {
        let mut one = |sequence: usize| {
            let num_rows = rng.between(1, lens[sequence].min(20));
            (sequence, rng.below(lens[sequence] - num_rows + 1), num_rows)
        };
        steps.push((0..lens.len()).map(&mut one).collect());
    }
    let mut workers: Vec<Worker> = (1..=3).map(Worker::new).collect();
    for (index, rows) in steps.iter().enumerate() {
        for isa in Isa::available() {
            let threads = if isa == Isa::Plain { 1 + index % 3 } else { 0 };
            for by in workers.iter_mut() {
                if threads > 0 && by.team.num_threads() != threads {
                    continue;
                }
                let waiting = [0, 3000, usize::MAX][index % 3];
                by.scratch.share_from(0, waiting);
                let found = world.run(isa, rows, by);
                let mut found = found.chunks_exact(world.row_len());
                for &(sequence, start, num_rows) in rows {
                    for position in start..start + num_rows {
                        let wanted = wanted[sequence][position].get_or_insert_with(|| {
                            bits(&world.run(Isa::Plain, &[(sequence, position, 1)], &mut alone))
                        });
                        let same = bits(found.next().unwrap()) == *wanted;
                        let (isa, threads) = (isa.name(), by.team.num_threads());
                        assert!(
                            same,
                            "{heads:?} {kv_type:?} {isa} {threads} threads, step {index}, waiting \
                             {waiting}: sequence {sequence} at {position} (seed {SEED})"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn cuts_company_and_threads_change_no_bit() {
    timed("attention cuts", 8.0, || {
        let mut rng = Rng::new(SEED + 2);
        let shapes = [(1, 1, 8), (2, 3, 24), (4, 8, 64), (1, 20, 16)];
        for (num_kv, group_len, head_dim) in shapes {
            for kv_type in [KvType::F32, KvType::F16] {
                check_cuts(Heads { num_kv, group_len, head_dim }, kv_type, &mut rng);
            }
        }
    });
}

#[test]
fn scratch_does_not_grow_with_the_square_of_the_context() {
    let heads = Heads { num_kv: 1, group_len: 1, head_dim: 8 };
    let world = World::random(&mut Rng::new(SEED + 3), heads, KvType::F32, &[2048]);
    let num_bytes = |len: usize| {
        let mut by = Worker::new(2);
        by.scratch.share_from(0, usize::MAX);
        world.run(Isa::detect(), &[(0, 0, len)], &mut by);
        world.run(Isa::detect(), &[(0, len - 1, 1)], &mut by);
        by.scratch.num_bytes()
    };
    let (short, long) = (num_bytes(512), num_bytes(2048));
    assert!(long <= 4 * short + 4096, "{short} bytes for 512 positions, {long} for 2048");
}
