//! Proves that every bad value ends with the right code and a message that names its field, and
//! that the server goes on. One table of mistakes, one server.

use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_tests::client::{Client, block_on, client, complete, greedy, start, stream};
use slipstream_tests::micro_pair::{self, CONTEXT_LEN};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request};

const VOCAB_SIZE: u32 = micro_pair::VOCAB_SIZE as u32;

type Change = Box<dyn Fn(&mut v1::GenerateRequest)>;

/// What is wrong, the code it ends with, what the message must name, and how to make it.
struct Mistake {
    name: String,
    code: Code,
    names: Vec<String>,
    change: Change,
}

fn mistake(
    name: impl Into<String>,
    code: Code,
    names: &[&str],
    change: impl Fn(&mut v1::GenerateRequest) + 'static,
) -> Mistake {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    Mistake { name: name.into(), code, names, change: Box::new(change) }
}

fn ids(ids: Vec<u32>) -> Option<Prompt> {
    Some(Prompt::TokenIds(v1::TokenIds { ids }))
}

fn prompts() -> Vec<Mistake> {
    let bad = Code::InvalidArgument;
    let context = CONTEXT_LEN.to_string();
    vec![
        mistake("no prompt", bad, &["prompt"], |r| r.prompt = None),
        mistake("empty text", bad, &["text"], |r| r.prompt = Some(Prompt::Text(String::new()))),
        mistake("no ids", bad, &["token_ids"], |r| r.prompt = ids(vec![])),
        mistake("id past the vocabulary", bad, &["token_ids.ids[2]", "1024"], |r| {
            r.prompt = ids(vec![1, 2, VOCAB_SIZE, 3]);
        }),
        mistake("largest id", bad, &["token_ids.ids[0]"], |r| r.prompt = ids(vec![u32::MAX])),
        mistake("prefix id", bad, &["output_prefix[1]"], |r| r.output_prefix = vec![1, VOCAB_SIZE]),
        mistake("long prefix", bad, &["output_prefix", "9", "8"], |r| r.output_prefix = vec![1; 9]),
        mistake("text too long", bad, &["text", "1048577", "1048576"], |r| {
            r.prompt = Some(Prompt::Text("x".repeat(1_048_577)));
        }),
        mistake("prompt as long as the context", Code::OutOfRange, &["prompt", &context], |r| {
            r.max_tokens = None;
            r.prompt = ids(vec![1; CONTEXT_LEN]);
        }),
        mistake("prompt over the context", Code::OutOfRange, &["token_ids", &context], |r| {
            r.prompt = ids(vec![1; CONTEXT_LEN + 1]);
        }),
        mistake("text over the context", Code::OutOfRange, &["prompt", &context], |r| {
            r.prompt = Some(Prompt::Text("fn main() {}\n".repeat(2000)));
        }),
        mistake("prefix over the context", Code::OutOfRange, &["output_prefix"], |r| {
            r.output_prefix = vec![1; CONTEXT_LEN + 1];
        }),
    ]
}

fn lengths() -> Vec<Mistake> {
    let bad = Code::InvalidArgument;
    vec![
        mistake("max_tokens 0", bad, &["max_tokens", "0"], |r| r.max_tokens = Some(0)),
        mistake("max_tokens -1", bad, &["max_tokens", "-1"], |r| r.max_tokens = Some(-1)),
        mistake("least max_tokens", bad, &["max_tokens"], |r| r.max_tokens = Some(i32::MIN)),
        mistake("huge max_tokens", Code::OutOfRange, &["max_tokens", "2147483647"], |r| {
            r.max_tokens = Some(i32::MAX);
        }),
        mistake("max_tokens one over", Code::OutOfRange, &["max_tokens", "1015"], |r| {
            r.prompt = ids(vec![1; 10]);
            r.max_tokens = Some(1015);
        }),
        mistake("min_tokens -1", bad, &["min_tokens", "-1"], |r| r.min_tokens = -1),
        mistake("min over max", bad, &["min_tokens", "9", "8"], |r| r.min_tokens = 9),
        mistake("17 stop strings", bad, &["stop_strings", "17", "16"], |r| {
            r.stop_strings = vec!["x".to_owned(); 17];
        }),
        mistake("empty stop string", bad, &["stop_strings[1]"], |r| {
            r.stop_strings = vec!["x".to_owned(), String::new()];
        }),
        mistake("long stop string", bad, &["stop_strings[0]", "257", "256"], |r| {
            r.stop_strings = vec!["x".repeat(257)];
        }),
        mistake("65 stop ids", bad, &["stop_token_ids", "65", "64"], |r| {
            r.stop_token_ids = vec![1; 65];
        }),
        mistake("stop id", bad, &["stop_token_ids[0]"], |r| r.stop_token_ids = vec![VOCAB_SIZE]),
    ]
}

fn numbers() -> Vec<Mistake> {
    type Set = fn(&mut v1::GenerateRequest, f64);
    let fields: [(&str, &[f64], Set); 7] = [
        ("temperature", &[-1.0, -0.001, 0.0009, 100.5], |r, x| r.temperature = Some(x)),
        ("top_p", &[0.0, -0.5, 1.0001, 2.0], |r, x| r.top_p = Some(x)),
        ("min_p", &[-0.1, 1.1], |r, x| r.min_p = x),
        ("repetition_penalty", &[0.0, -1.0, 0.0099, 101.0], |r, x| r.repetition_penalty = Some(x)),
        ("presence_penalty", &[-2.1, 2.1], |r, x| r.presence_penalty = x),
        ("frequency_penalty", &[-2.1, 2.1], |r, x| r.frequency_penalty = x),
        ("logit_bias[0].bias", &[-100.5, 100.5], |r, bias| {
            r.logit_bias = vec![v1::LogitBias { token_id: 1, bias }];
        }),
    ];
    let mut mistakes = Vec::new();
    for (field, values, set) in fields {
        let always = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN];
        for &value in values.iter().chain(&always) {
            let name = format!("{field} = {value}");
            mistakes.push(mistake(name, Code::InvalidArgument, &[field], move |r| set(r, value)));
        }
    }
    mistakes.push(mistake("top_k -1", Code::InvalidArgument, &["top_k", "-1"], |r| r.top_k = -1));
    mistakes
}

fn others() -> Vec<Mistake> {
    let bad = Code::InvalidArgument;
    let bias = |token_id| v1::LogitBias { token_id, bias: 1.0 };
    let speculation = |mode: i32, draft_len| Some(v1::Speculation { mode, draft_len });
    let fixed = i32::from(Mode::Fixed);
    vec![
        mistake("bias id", bad, &["logit_bias[1].token_id"], move |r| {
            r.logit_bias = vec![bias(1), bias(VOCAB_SIZE)];
        }),
        mistake("bias twice", bad, &["logit_bias[2].token_id", "7"], move |r| {
            r.logit_bias = vec![bias(7), bias(8), bias(7)];
        }),
        mistake("1025 biases", bad, &["logit_bias", "1025", "1024"], move |r| {
            r.logit_bias = (0..1025).map(bias).collect();
        }),
        mistake("unknown mode", bad, &["speculation.mode", "77"], move |r| {
            r.speculation = speculation(77, None);
        }),
        mistake("draft_len -1", bad, &["speculation.draft_len", "-1"], move |r| {
            r.speculation = speculation(fixed, Some(-1));
        }),
        mistake("draft_len 9", bad, &["speculation.draft_len", "9", "8"], move |r| {
            r.speculation = speculation(fixed, Some(9));
        }),
        mistake("fixed without draft_len", bad, &["speculation.draft_len"], move |r| {
            r.speculation = speculation(fixed, None);
        }),
        mistake("off with draft_len", bad, &["speculation.draft_len"], move |r| {
            r.speculation = speculation(Mode::Off.into(), Some(2));
        }),
        mistake("another model", Code::NotFound, &["model", "gpt"], |r| r.model = "gpt".to_owned()),
        mistake("long model name", bad, &["model", "257"], |r| r.model = "m".repeat(257)),
        mistake("empty request id", bad, &["request_id"], |r| r.request_id = Some(String::new())),
        mistake("request id of two lines", bad, &["request_id"], |r| {
            r.request_id = Some("a\nb".to_owned());
        }),
        mistake("long request id", bad, &["request_id", "129"], |r| {
            r.request_id = Some("i".repeat(129));
        }),
    ]
}

/// Whose it is, how urgent, and what it shares.
fn belonging() -> Vec<Mistake> {
    let bad = Code::InvalidArgument;
    let mut mistakes = vec![
        mistake("long tenant", bad, &["tenant", "65", "64"], |r| r.tenant = "t".repeat(65)),
        mistake("tenant of two words", bad, &["tenant"], |r| r.tenant = "a b".to_owned()),
        mistake("tenant of two lines", bad, &["tenant"], |r| r.tenant = "a\nb".to_owned()),
        mistake("tenant out of ASCII", bad, &["tenant"], |r| r.tenant = "t\u{e9}".to_owned()),
        mistake("long salt", bad, &["cache_salt", "129", "128"], |r| {
            r.cache_salt = "s".repeat(129);
        }),
        mistake("long salt in characters", bad, &["cache_salt", "130", "128"], |r| {
            r.cache_salt = "\u{e9}".repeat(65);
        }),
        mistake("long salt that is not used", bad, &["cache_salt", "129"], |r| {
            r.cache_salt = "s".repeat(129);
            r.no_prefix_reuse = true;
        }),
        mistake("prefix of several", bad, &["output_prefix", "n is 2"], |r| {
            r.output_prefix = vec![1];
            r.n = Some(2);
        }),
        mistake("index past the last", bad, &["sample_index", "4294967280"], |r| {
            r.sample_index = u32::MAX - 14;
            r.n = Some(16);
        }),
    ];
    for class in [-1, 4, i32::MAX, i32::MIN] {
        let number = class.to_string();
        let name = format!("priority {class}");
        mistakes.push(mistake(name, bad, &["priority", &number], move |r| r.priority = class));
    }
    for n in [0, -1, 17, i32::MAX, i32::MIN] {
        let number = n.to_string();
        let name = format!("n = {n}");
        mistakes.push(mistake(name, bad, &["n: ", "1 to 16", &number], move |r| r.n = Some(n)));
    }
    mistakes
}

async fn assert_mistake(client: &Client, mistake: &Mistake) {
    let mut request = greedy("fn main() {", 8);
    (mistake.change)(&mut request);
    for status in [
        stream(client, request.clone()).await.expect_err(&mistake.name),
        complete(client, request.clone()).await.expect_err(&mistake.name),
    ] {
        assert_eq!(status.code(), mistake.code, "{}: {}", mistake.name, status.message());
        for name in &mistake.names {
            let message = status.message();
            assert!(message.contains(name.as_str()), "{}: {message}", mistake.name);
        }
        assert!(status.message().len() < 400, "{}: {}", mistake.name, status.message());
    }
}

#[test]
fn every_mistake_names_its_field_and_the_server_goes_on() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let before = stream(&client, greedy("fn main() {", 8)).await.unwrap();
        for mistake in [prompts(), lengths(), numbers(), others(), belonging()].iter().flatten() {
            assert_mistake(&client, mistake).await;
        }
        let after = stream(&client, greedy("fn main() {", 8)).await.unwrap();
        assert_eq!(before.bytes(), after.bytes());
        server.stop().await.unwrap();
    });
}

fn limit(name: &'static str, change: impl Fn(&mut v1::GenerateRequest) + 'static) -> Limit {
    (name, Box::new(change))
}

type Limit = (&'static str, Change);

fn lengths_at_their_limits() -> Vec<Limit> {
    vec![
        limit("max_tokens to the context", |r| {
            r.prompt = ids(vec![1; 1000]);
            r.max_tokens = Some(24);
        }),
        limit("one token of prompt", |r| r.prompt = ids(vec![0])),
        limit("context - 1", |r| {
            r.max_tokens = None;
            r.prompt = ids(vec![VOCAB_SIZE - 1; CONTEXT_LEN - 1]);
        }),
        limit("NUL and whitespace", |r| {
            let text = "\0 \t\r\n\u{2028}\u{202e}e\u{301}\u{301}";
            r.prompt = Some(Prompt::Text(text.to_owned()));
        }),
        limit("stops", |r| {
            r.stop_strings = vec!["y".repeat(256); 16];
            r.stop_token_ids = vec![0; 64];
            r.min_tokens = 8;
        }),
    ]
}

fn numbers_at_their_limits() -> Vec<Limit> {
    let bias = |token_id| v1::LogitBias { token_id, bias: -100.0 };
    vec![
        limit("coldest", |r| r.temperature = Some(0.001)),
        limit("hottest", |r| r.temperature = Some(100.0)),
        limit("negative zero", |r| r.temperature = Some(-0.0)),
        limit("top_k", |r| {
            r.temperature = Some(1.0);
            r.top_k = i32::MAX;
        }),
        limit("least top_p", |r| {
            r.temperature = Some(1.0);
            r.top_p = Some(f64::MIN_POSITIVE);
        }),
        limit("min_p 1", |r| {
            r.temperature = Some(1.0);
            r.min_p = 1.0;
        }),
        limit("penalties", |r| {
            r.repetition_penalty = Some(100.0);
            r.presence_penalty = 2.0;
            r.frequency_penalty = -2.0;
        }),
        limit("all biases", move |r| r.logit_bias = (0..1024).map(bias).collect()),
        limit("largest seed", |r| {
            r.temperature = Some(1.0);
            r.seed = Some(u64::MAX);
            r.sample_index = u32::MAX;
        }),
    ]
}

fn belonging_at_its_limits() -> Vec<Limit> {
    let classes = [v1::Priority::Interactive, v1::Priority::Normal, v1::Priority::Batch];
    let mut limits = vec![
        limit("longest tenant", |r| r.tenant = "~!".repeat(32)),
        limit("longest salt", |r| r.cache_salt = "\u{e9}\0".repeat(42) + "ss"),
        limit("a salt for nothing", |r| {
            r.cache_salt = " ".to_owned();
            r.no_prefix_reuse = true;
        }),
        limit("one sample", |r| {
            r.n = Some(1);
            r.sample_index = u32::MAX;
            r.output_prefix = vec![1];
        }),
    ];
    for class in classes {
        limits.push(limit("a class", move |r| r.priority = class.into()));
    }
    limits
}

#[test]
fn values_at_their_limits_are_taken() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let all = [lengths_at_their_limits(), numbers_at_their_limits(), belonging_at_its_limits()];
        for (name, change) in all.iter().flatten() {
            let mut request = greedy("fn main() {", 8);
            change(&mut request);
            let answer = stream(&client, request).await;
            assert!(answer.is_ok(), "{name}: {answer:?}");
        }
        server.stop().await.unwrap();
    });
}

#[test]
fn malformed_deadlines_are_refused() {
    block_on(async {
        let server = start(|_| {}).await;
        for value in ["", "S", "12", "-1S", "1.5S", "123456789m", "1x"] {
            let mut request = Request::new(greedy("fn main() {", 8));
            let value_header: MetadataValue<_> = value.parse().unwrap();
            request.metadata_mut().insert("grpc-timeout", value_header);
            let status = client(&server).generate(request).await.expect_err(value);
            assert_eq!(status.code(), Code::InvalidArgument, "{value:?}: {status:?}");
            assert!(status.message().contains("grpc-timeout"), "{value:?}: {status:?}");
        }
        server.stop().await.unwrap();
    });
}
