//! Owns the `Models` service: what is served, told to whoever asks. Immutable once loaded.

use slipstream_proto::v1;
use slipstream_proto::v1::models_server::Models;
use tonic::{Request, Response, Status};

use crate::grpc::caller::answer;
use crate::grpc::events::wire_count;
use crate::grpc::served::ServedModel;
use crate::grpc::shared::Shared;
use crate::grpc::validate::check_model;

/// The `Models` service.
#[derive(Clone)]
pub(crate) struct ModelsService {
    shared: Shared,
}

impl ModelsService {
    /// A service over what all share.
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared }
    }
}

fn described(model: &ServedModel) -> v1::Model {
    let draft = model.draft.as_ref();
    v1::Model {
        name: model.name.clone(),
        fingerprint: model.fingerprint.clone(),
        vocabulary_fingerprint: model.vocabulary_fingerprint.clone(),
        vocab_size: wire_count(model.vocab_size),
        context_len: wire_count(model.context_len),
        eos_token_ids: model.eos_ids.iter().map(|id| id.0).collect(),
        draft_len_max: wire_count(model.draft_len_max),
        draft: draft.map(|draft| v1::Draft { name: draft.name.clone(), epoch: draft.epoch.0 }),
    }
}

#[tonic::async_trait]
impl Models for ModelsService {
    async fn list(
        &self,
        call: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        answer(
            call,
            |_| None,
            |_, _| async {
                let model = described(&self.shared.backend()?.model);
                Ok(v1::ListModelsResponse { models: vec![model] })
            },
        )
        .await
    }

    async fn get(&self, call: Request<v1::GetModelRequest>) -> Result<Response<v1::Model>, Status> {
        answer(
            call,
            |_| None,
            |_, wire: v1::GetModelRequest| async move {
                let model = &self.shared.backend()?.model;
                check_model("name", &wire.name, model)?;
                Ok(described(model))
            },
        )
        .await
    }
}
