//! Proves a real pair against the oracle, and guards the numerics version: the micro verifier on
//! the plain twins, one row at a time, is what defines a response; the engine with the fastest
//! kernels, a team of threads, a batch, chunks and the micro draft must give the same bytes; and
//! both must give the bytes recorded in `fixtures/recorded_output.txt`, on every machine.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_model::clock::MonotonicClock;
use slipstream_model::ids::{DraftEpoch, TokenId};
use slipstream_model::kernels::{Isa, NUMERICS_VERSION};
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::sampling::SamplingParams;
use slipstream_model::tokenizer::Tokenizer;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_server::engine::request::{Request, Speculation};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};
use slipstream_tests::drive::{Case, assert_expected, drive};
use slipstream_tests::reference::decode;
use slipstream_tests::requests::plain_request;
use slipstream_tests::timing::timed;

const VERIFIER: &[u8] = include_bytes!("../models/micro/verifier.gguf");
const DRAFT: &[u8] = include_bytes!("../models/micro/draft.gguf");
const RECORDED: &str = include_str!("fixtures/recorded_output.txt");

/// Writes the file anew: only with a raised numerics version or another micro pair.
const RECORD_VARIABLE: &str = "SLIPSTREAM_RECORD_OUTPUT";

const PROMPTS: [&str; 6] = [
    "fn main() {\n    let mut ",
    "/// Returns the number of elements in the ",
    "impl<T> Iterator for Chunks<'_, T> {\n    type Item = ",
    "use std::collections::HashMap;\nuse std::",
    "#[test]\nfn ünïcode_строки() {\n    assert_eq!(\"\u{1F980}\", ",
    "x",
];

fn loaded(bytes: &'static [u8]) -> LoadedModel {
    load(ModelSource::GgufBytes(bytes), &LoadOptions::default(), &mut |_| {}).unwrap()
}

fn transformer(packed: &Arc<PackedLlama>, isa: Isa, threads: usize) -> Transformer {
    let options = TransformerOptions { num_blocks: 256, threads, isa, kv_type: KvType::F32 };
    let mut transformer = Transformer::new(Arc::clone(packed), options).unwrap();
    transformer.share_products_from(0); // the smallest ones too, where there is a team
    transformer
}

/// Every prompt with every way of choosing, stops on some.
fn requests(tokenizer: &Tokenizer) -> Vec<Request> {
    let greedy = SamplingParams::greedy();
    let sampled = SamplingParams { temperature: 0.8, seed: 0x51, ..greedy.clone() };
    let ways = [
        greedy.clone(),
        sampled.clone(),
        SamplingParams { temperature: 1.5, seed: u64::MAX, sample_index: 3, ..greedy.clone() },
        SamplingParams { top_k: 20, top_p: 0.9, min_p: 0.02, ..sampled.clone() },
        SamplingParams {
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            frequency_penalty: 0.1,
            ..sampled.clone()
        },
        SamplingParams { temperature: 0.2, repetition_penalty: 1.1, ..sampled },
    ];
    let mut requests = Vec::new();
    for (prompt_index, prompt) in PROMPTS.iter().enumerate() {
        let prompt = tokenizer.encode(prompt, true).unwrap();
        for (way_index, params) in ways.iter().enumerate() {
            let mut request = plain_request(prompt.clone(), 40);
            request.params = params.clone();
            request.params.end_ids = tokenizer.eos_ids().to_vec();
            request.logprobs = true;
            if (prompt_index + way_index).is_multiple_of(3) {
                request.stop_strings = vec![b"\n\n".to_vec(), b"}".to_vec()];
            }
            requests.push(request);
        }
    }
    requests
}

/// One line per request: reason and a hash of ids, log-probabilities and text.
fn lines(cases: &[Case]) -> String {
    let mut lines = String::new();
    for case in cases {
        let mut hasher = blake3::Hasher::new();
        for token in &case.expected.tokens {
            hasher.update(&token.0.to_le_bytes());
        }
        for logprob in &case.expected.logprobs {
            hasher.update(&logprob.to_bits().to_le_bytes());
        }
        hasher.update(case.expected.text.as_bytes());
        let hash = hasher.finalize().to_hex();
        let num_tokens = case.expected.tokens.len();
        writeln!(lines, "{num_tokens} {:?} {}", case.expected.reason, &hash[..32]).unwrap();
    }
    lines
}

#[test]
fn real_pair_gives_the_oracles_bytes_and_the_recorded_ones() {
    timed("recorded_output", 20.0, check_recorded_output);
}

fn check_recorded_output() {
    let model = loaded(VERIFIER);
    let heading = format!("numerics {NUMERICS_VERSION} verifier {}\n", model.digest);
    let tokenizer = model.tokenizer;
    let token_bytes = tokenizer.token_bytes();
    let pieces: Vec<Vec<u8>> = (0..model.config.vocab_size)
        .map(|id| token_bytes.get(TokenId(id as u32)).to_vec())
        .collect();
    let packed = Arc::new(PackedLlama::pack(model.config, model.weights).unwrap());
    let mut oracle = transformer(&packed, Isa::Plain, 1);
    let cases: Vec<Case> = requests(&tokenizer)
        .into_iter()
        .map(|request| Case { expected: decode(&mut oracle, &pieces, &request, 0), request })
        .collect();

    let draft = loaded(DRAFT);
    let draft = Arc::new(PackedLlama::pack(draft.config, draft.weights).unwrap());
    for (draft_len, step_tokens_max) in [(0, 256), (1, 7), (4, 64), (8, 256)] {
        let proposer = ModelProposer::new(
            Box::new(transformer(&draft, Isa::detect(), 1)),
            DraftEpoch(1),
            ModelProposerOptions::default(),
        );
        let mut engine = Engine::new(EngineParts {
            config: EngineConfig { step_tokens_max, max_running: 9, ..EngineConfig::default() },
            verifier: Box::new(transformer(&packed, Isa::detect(), 2)),
            proposer: Some(Box::new(proposer)),
            token_bytes: tokenizer.token_bytes(),
            clock: Arc::new(MonotonicClock::start()),
            cache_key: [7; 32],
        });
        let speculation = Speculation::Fixed(draft_len);
        let requests: Vec<Request> =
            cases.iter().map(|case| Request { speculation, ..case.request.clone() }).collect();
        let outcome = drive(&mut engine, &requests, 2);
        assert_expected(&outcome, &cases, &pieces, &(draft_len, step_tokens_max));
        assert_eq!(outcome.counters.accepted > 0, draft_len > 0, "{:?}", outcome.counters);
    }

    let now = heading + &lines(&cases);
    if std::env::var_os(RECORD_VARIABLE).is_some() {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/recorded_output.txt");
        std::fs::write(path, &now).unwrap();
        return;
    }
    assert_eq!(
        now, RECORDED,
        "output bytes have changed. With another micro pair, record them anew \
         ({RECORD_VARIABLE}=1); otherwise find out why, and if the change is wanted raise \
         NUMERICS_VERSION first"
    );
}
