//! Proves that a warm step allocates nothing on the engine thread: from plan to commit, with a
//! fixed set of sequences, plain and speculative, greedy and sampled. A binary of its own, because
//! counting takes another allocator.
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the place and the value")]

use std::sync::Arc;

use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_draft::proposer::Proposer;
use slipstream_model::batch::RaggedBatch;
use slipstream_model::clock::{Micros, MonotonicClock};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, DraftEpoch, SequenceId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::sampling::SamplingParams;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_server::engine::request::{Request, Speculation};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};
use slipstream_tests::micro_pair;
use slipstream_tests::requests::plain_request;

/// Whether the networks' own forward passes are counted too; to find out who is to blame.
const IS_NETWORK_COUNTED: bool = true;

const NUM_SEQUENCES: u64 = 4;
const PROMPT_LEN: u32 = 40;
/// Steps before counting begins: prompts are computed, and every list has been as long as it gets.
const WARM_UP_STEPS: usize = 12;
const COUNTED_STEPS: usize = 100;

/// The network as the engine gets it.
struct Network(Transformer);

impl Forward for Network {
    fn limits(&self) -> ForwardLimits {
        self.0.limits()
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        if IS_NETWORK_COUNTED {
            return self.0.forward(batch, logits);
        }
        let mut result = Ok(());
        allocation_counter::opt_out(|| result = self.0.forward(batch, logits));
        result
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.0.copy_block(from, to);
    }
}

fn read(path: &str) -> LoadedModel {
    load(ModelSource::Path(path.into()), &LoadOptions::default(), &mut |_| {}).unwrap()
}

/// The network of a loaded model.
fn network(model: LoadedModel) -> Box<Network> {
    let packed = Arc::new(PackedLlama::pack(model.config, model.weights).unwrap());
    let options = TransformerOptions {
        num_blocks: 256,
        threads: 1,
        isa: Isa::detect(),
        kv_type: KvType::F32,
    };
    Box::new(Network(Transformer::new(packed, options).unwrap()))
}

fn engine() -> Engine {
    let (verifier, draft) = (read(micro_pair::VERIFIER), read(micro_pair::DRAFT));
    let token_bytes = verifier.tokenizer.token_bytes();
    let options = ModelProposerOptions::default();
    let proposer: Box<dyn Proposer> =
        Box::new(ModelProposer::new(network(draft), DraftEpoch(1), options));
    Engine::new(EngineParts {
        config: EngineConfig::default(),
        verifier: network(verifier),
        proposer: Some(proposer),
        token_bytes,
        clock: Arc::new(MonotonicClock::start()),
        cache_key: [7; 32],
    })
}

/// Runs four sequences and counts. Returns how many tokens came with how many accepted proposals.
#[track_caller]
fn check(what: &str, params: &SamplingParams, speculation: Speculation) -> (u64, u64) {
    let mut engine = engine();
    for id in 1..=NUM_SEQUENCES {
        let prompt = (0..PROMPT_LEN).map(|index| TokenId(300 + index * id as u32)).collect();
        let params = SamplingParams { seed: id, ..params.clone() };
        let request = Request {
            params,
            speculation,
            logprobs: id == NUM_SEQUENCES,
            stop_strings: vec![b"never in this text".to_vec()],
            deadline: Some(Micros(u64::MAX)),
            ..plain_request(prompt, 900)
        };
        engine.submit(SequenceId(id), request).unwrap();
    }
    for _ in 0..WARM_UP_STEPS {
        engine.step();
    }
    let before = *engine.counters();
    for step in 0..COUNTED_STEPS {
        let mut report = None;
        let counted = allocation_counter::measure(|| report = Some(engine.step()));
        assert_eq!(counted.count_total, 0, "{what}: step {step} allocates: {counted:?}");
        let report = report.unwrap();
        assert!(report.num_committed >= NUM_SEQUENCES as usize, "{what}: {report:?}");
        // What becomes of the output is not part of a step.
        for id in 1..=NUM_SEQUENCES {
            engine.take_event(SequenceId(id));
        }
    }
    let after = engine.counters();
    assert_eq!(after.draft_faults + after.dropped_proposals + after.finished, 0, "{what}");
    (after.committed - before.committed, after.accepted - before.accepted)
}

fn all_ways(speculation: Speculation) {
    let greedy = SamplingParams::greedy();
    let warm = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let bias = vec![(TokenId(5), -1.0), (TokenId(9), 0.5)];
    for (name, params) in [
        ("greedy", greedy.clone()),
        ("sampled", warm.clone()),
        ("top-k", SamplingParams { top_k: 50, ..warm.clone() }),
        ("top-p", SamplingParams { top_p: 0.95, ..warm.clone() }),
        ("min-p", SamplingParams { min_p: 0.05, ..warm.clone() }),
        (
            "bias and penalties",
            SamplingParams { repetition_penalty: 1.1, logit_bias: bias, ..warm },
        ),
    ] {
        let what = format!("{name}, {speculation:?}");
        let (num_committed, num_accepted) = check(&what, &params, speculation);
        let is_plain = speculation == Speculation::Off;
        assert_eq!(num_accepted == 0, is_plain, "{what}: {num_accepted} of {num_committed}");
    }
}

#[test]
fn a_plain_step_allocates_nothing() {
    all_ways(Speculation::Off);
}

#[test]
fn a_speculative_step_allocates_nothing() {
    all_ways(Speculation::Fixed(4));
}

#[test]
fn what_allocates_is_seen() {
    let counted = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(counted.count_total, 1);
    let hidden = allocation_counter::measure(|| {
        allocation_counter::opt_out(|| drop(std::hint::black_box(Box::new(1))));
    });
    assert_eq!(hidden.count_total, 0);
}
