//! Owns the `Tokenization` service: the verifier's tokenizer for clients, with the bounds that
//! prompts have and on the threads that prompts are tokenised on. Knows no engine.

use std::sync::Arc;

use slipstream_model::ids::TokenId;
use slipstream_proto::v1;
use slipstream_proto::v1::tokenization_server::Tokenization;
use tonic::{Request, Response, Status};

use crate::grpc::caller::answer;
use crate::grpc::refusal::Refusal;
use crate::grpc::served::ServedModel;
use crate::grpc::shared::Shared;
use crate::grpc::validate::{check_model, encode, token_ids};

/// The `Tokenization` service.
#[derive(Clone)]
pub(crate) struct TokenizationService {
    shared: Shared,
}

impl TokenizationService {
    /// A service over what all share.
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared }
    }
}

fn tokenize(
    wire: &v1::TokenizeRequest,
    model: &ServedModel,
) -> Result<v1::TokenizeResponse, Refusal> {
    check_model("model", &wire.model, model)?;
    let ids = encode(&wire.text, wire.add_special_tokens.unwrap_or(true), model)?;
    let table = model.tokenizer.token_bytes();
    let token_bytes = if wire.token_bytes { bytes_of(&ids, &table) } else { Vec::new() };
    Ok(v1::TokenizeResponse { token_ids: ids.iter().map(|id| id.0).collect(), token_bytes })
}

fn bytes_of(ids: &[TokenId], table: &slipstream_model::token_bytes::TokenBytes) -> Vec<Vec<u8>> {
    ids.iter().map(|id| table.get(*id).to_vec()).collect()
}

fn detokenize(
    wire: &v1::DetokenizeRequest,
    model: &ServedModel,
) -> Result<v1::DetokenizeResponse, Refusal> {
    check_model("model", &wire.model, model)?;
    let ids = token_ids("token_ids", &wire.token_ids, model)?;
    let bytes = bytes_of(&ids, &model.tokenizer.token_bytes()).concat();
    Ok(v1::DetokenizeResponse { text: String::from_utf8_lossy(&bytes).into_owned(), bytes })
}

#[tonic::async_trait]
impl Tokenization for TokenizationService {
    async fn tokenize(
        &self,
        call: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        answer(
            call,
            |_| None,
            |_, wire: v1::TokenizeRequest| async move {
                let model = Arc::clone(&self.shared.backend()?.model);
                let text_bytes = wire.text.len();
                let work = self.shared.offload.run(text_bytes, move || tokenize(&wire, &model));
                Ok(work.await??)
            },
        )
        .await
    }

    async fn detokenize(
        &self,
        call: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        answer(
            call,
            |_| None,
            |_, wire: v1::DetokenizeRequest| async move {
                let model = Arc::clone(&self.shared.backend()?.model);
                // Ids are bounded by the context: never a large text.
                Ok(self.shared.offload.run(0, move || detokenize(&wire, &model)).await??)
            },
        )
        .await
    }
}
