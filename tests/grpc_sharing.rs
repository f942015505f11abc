//! Proves, over the wire, who shares the KV of equal prompts and who does not: tenants, salts and
//! those who opt out; that gateways can name the tenant; and that no byte depends on any of it.

use slipstream_proto::v1;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_tests::client::{
    Answer, Client, block_on, client, sampled, start, stream, stream_samples,
};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

const BLOCK_LEN: u32 = 16;

/// A prompt of many blocks that nobody else asks with.
fn prompt(name: &str) -> String {
    let lines = (0..12).map(|line| format!("let {name}_{line} = {name}.get({line});\n"));
    lines.collect()
}

fn of(tenant: &str, name: &str) -> v1::GenerateRequest {
    let tenant = tenant.to_owned();
    v1::GenerateRequest { tenant, ..sampled(&prompt(name), 24, 3) }
}

/// All full blocks but what has to be computed for the first token.
fn shareable(answer: &Answer) -> u32 {
    (answer.started.prompt_tokens - 1) / BLOCK_LEN * BLOCK_LEN
}

/// Asks, and says how many tokens of the prompt were there already. The output is always the same.
async fn cached(client: &Client, request: v1::GenerateRequest, cold: &Answer) -> u32 {
    let answer = stream(client, request).await.unwrap();
    assert_eq!(answer.bytes(), cold.bytes());
    answer.cached_len()
}

#[test]
fn one_tenant_shares_with_itself_and_with_nobody_else() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let cold = stream(&client, of("a", "left")).await.unwrap();
        let all = shareable(&cold);
        assert!(all >= 4 * BLOCK_LEN, "the prompt is short");
        assert_eq!(cold.cached_len(), 0);
        assert_eq!(cached(&client, of("a", "left"), &cold).await, all);
        for other in ["b", "A", "aa", ""] {
            assert_eq!(cached(&client, of(other, "left"), &cold).await, 0, "{other:?}");
            assert_eq!(cached(&client, of(other, "left"), &cold).await, all, "{other:?}");
        }
        assert_eq!(cached(&client, of("a", "left"), &cold).await, all);
        // Another beginning shares nothing, a longer prompt all of the shorter.
        let other = stream(&client, of("a", "right")).await.unwrap();
        assert_eq!(other.cached_len(), 0);
        let longer = prompt("left") + "let more = ";
        let longer = v1::GenerateRequest { prompt: Some(Prompt::Text(longer)), ..of("a", "left") };
        assert!(stream(&client, longer).await.unwrap().cached_len() >= all - BLOCK_LEN);
        server.stop().await.unwrap();
    });
}

#[test]
fn salts_and_those_who_opt_out_are_apart() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let salted =
            |salt: &str| v1::GenerateRequest { cache_salt: salt.to_owned(), ..of("a", "left") };
        let off = v1::GenerateRequest { no_prefix_reuse: true, ..of("a", "left") };
        // Who opts out leaves nothing ...
        let cold = stream(&client, off.clone()).await.unwrap();
        let all = shareable(&cold);
        assert_eq!(cached(&client, off.clone(), &cold).await, 0);
        assert_eq!(cached(&client, of("a", "left"), &cold).await, 0);
        assert_eq!(cached(&client, of("a", "left"), &cold).await, all);
        // ... and uses nothing.
        assert_eq!(cached(&client, off, &cold).await, 0);
        for salt in ["s", "S", "\u{e9}"] {
            assert_eq!(cached(&client, salted(salt), &cold).await, 0, "{salt:?}");
            assert_eq!(cached(&client, salted(salt), &cold).await, all, "{salt:?}");
        }
        assert_eq!(cached(&client, salted(""), &cold).await, all, "no salt");
        server.stop().await.unwrap();
    });
}

#[test]
fn a_conversation_finds_its_earlier_answers() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let mut ids: Vec<u32> = (0..100).map(|index| index % 90 + 300).collect();
        let mut known_len = 0;
        for turn in 0..4 {
            let prompt = Some(Prompt::TokenIds(v1::TokenIds { ids: ids.clone() }));
            let request = v1::GenerateRequest { prompt, ..sampled("", 40, turn) };
            let answer = stream(&client, request).await.unwrap();
            assert_eq!(answer.cached_len(), known_len / BLOCK_LEN * BLOCK_LEN, "turn {turn}");
            ids.extend(answer.ids());
            // The last token of an answer is never computed.
            known_len = ids.len() as u32 - 1;
            ids.extend([7, 8, 9]);
        }
        server.stop().await.unwrap();
    });
}

async fn with_header(
    client: &Client,
    names: &[&str],
    request: v1::GenerateRequest,
) -> Result<Answer, Status> {
    let mut call = Request::new(request);
    for name in names {
        let value: MetadataValue<_> = name.parse().unwrap();
        call.metadata_mut().append("x-tenant-id", value);
    }
    Ok(stream_samples(client, call).await?.remove(0))
}

#[test]
fn gateways_name_the_tenant_of_messages_that_do_not() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let cold = with_header(&client, &["a"], of("", "left")).await.unwrap();
        let all = shareable(&cold);
        assert_eq!(cached(&client, of("a", "left"), &cold).await, all, "they are one tenant");
        assert_eq!(cached(&client, of("", "left"), &cold).await, 0, "nobody's");
        let b = with_header(&client, &["a"], of("b", "left")).await.unwrap();
        assert_eq!(b.cached_len(), 0, "the message goes before metadata");
        let none = with_header(&client, &[""], of("", "left")).await.unwrap();
        assert_eq!(none.cached_len(), all, "as if there were none");
        server.stop().await.unwrap();
    });
}

#[test]
fn a_tenant_that_cannot_be_one_is_refused_wherever_it_stands() {
    block_on(async {
        let server = start(|_| {}).await;
        let client = client(&server);
        let longest = "t".repeat(64);
        assert!(with_header(&client, &[&longest], of("", "left")).await.is_ok());
        let too_long = "t".repeat(65);
        for names in [&["a b"][..], &[&too_long], &["a", "a"], &["", "b"]] {
            for in_message in ["", "fine"] {
                let refused = with_header(&client, names, of(in_message, "left")).await;
                let status = refused.expect_err("no tenant");
                assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
                let details = status.get_error_details();
                let violation = &details.bad_request().unwrap().field_violations[0];
                assert_eq!(violation.field, "x-tenant-id", "{status:?}");
            }
        }
        server.stop().await.unwrap();
    });
}
