//! The one table of every metric: what `/metrics` shows is these rows and nothing else. Knows where
//! each value is read; counts nothing itself.

use super::metric::{Metric, Unit};
use super::values::{
    build, by_priority, connections_closed, count, finished_by, finished_reason, flag, kv_usage,
    kv_used, model, only, per_position, seconds, stages,
};

/// Every metric, in the order of the page.
pub const METRICS: &[Metric] = &[
    // Requests, as the engine sees them.
    Metric::counter(
        "slipstream_requests_submitted_total",
        Unit::Number("requests"),
        "Requests that the engine took.",
        |r| count(r.engine.counters.submitted),
    ),
    Metric::counter_by(
        "slipstream_requests_finished_total",
        Unit::Number("requests"),
        "Requests that came to an end, by how they ended.",
        &["reason"],
        |r| finished_by(&r.engine.counters.finished_by),
    ),
    Metric::counter(
        "slipstream_requests_released_total",
        Unit::Number("requests"),
        "Requests of which nothing is left; equals those submitted when the engine is \
         idle.",
        |r| count(r.engine.counters.released),
    ),
    Metric::counter_by(
        "slipstream_request_success_total",
        Unit::Number("requests"),
        "Requests that came to an end, by the four reasons that dashboards know.",
        &["finished_reason"],
        |r| finished_reason(&r.engine.counters.finished_by),
    )
    .also("vllm:request_success_total"),
    Metric::gauge(
        "slipstream_requests_live",
        Unit::Number("requests"),
        "Requests that the engine holds, ended ones with unsent output included.",
        |r| count(r.engine.num_held as u64),
    ),
    Metric::gauge(
        "slipstream_num_requests_running",
        Unit::Number("requests"),
        "Requests that hold KV blocks and take part in steps.",
        |r| count(r.engine.num_running as u64),
    )
    .also("vllm:num_requests_running"),
    Metric::gauge(
        "slipstream_num_requests_waiting",
        Unit::Number("requests"),
        "Requests that wait for room, preempted ones included.",
        |r| count(r.engine.num_waiting as u64),
    )
    .also("vllm:num_requests_waiting"),
    Metric::gauge_by(
        "slipstream_num_requests_waiting_by_priority",
        Unit::Number("requests"),
        "The same by the priority that they came with.",
        &["priority"],
        by_priority,
    ),
    Metric::gauge(
        "slipstream_num_requests_paused",
        Unit::Number("requests"),
        "Running requests whose client is too far behind: they keep their blocks and \
         compute nothing.",
        |r| count(r.engine.num_paused as u64),
    ),
    Metric::counter(
        "slipstream_request_pauses_total",
        Unit::Number("pauses"),
        "Times that a request paused because its client was too far behind.",
        |r| count(r.engine.counters.pauses),
    ),
    Metric::counter(
        "slipstream_requests_shed_total",
        Unit::Number("requests"),
        "Requests that the engine refused because its queue was full.",
        |r| count(r.engine.counters.shed),
    ),
    Metric::counter(
        "slipstream_requests_refused_late_total",
        Unit::Number("requests"),
        "Requests that the engine refused because their deadline could not be met.",
        |r| count(r.engine.counters.refused_late),
    ),
    // Tokens and steps.
    Metric::counter(
        "slipstream_prompt_tokens_total",
        Unit::Number("tokens"),
        "Prompt tokens of the requests taken.",
        |r| count(r.engine.counters.prompt_tokens),
    )
    .also("vllm:prompt_tokens_total"),
    Metric::counter(
        "slipstream_generation_tokens_total",
        Unit::Number("tokens"),
        "Output tokens handed to the streams of clients.",
        |r| count(r.engine.counters.taken),
    )
    .also("vllm:generation_tokens_total"),
    Metric::counter(
        "slipstream_committed_tokens_total",
        Unit::Number("tokens"),
        "Output tokens committed, those included that a stop string or an early end \
         took back.",
        |r| count(r.engine.counters.committed),
    ),
    Metric::counter(
        "slipstream_steps_total",
        Unit::Number("steps"),
        "Steps that computed rows.",
        |r| count(r.engine.counters.steps),
    ),
    Metric::counter(
        "slipstream_rows_total",
        Unit::Number("rows"),
        "Rows (token positions) that the verifier computed.",
        |r| count(r.engine.counters.rows),
    ),
    Metric::histogram(
        "slipstream_step_time_seconds",
        Unit::Seconds,
        "Steps that computed rows, from their beginning until their output is handed on.",
        |m| only(&m.engine.steps),
    ),
    Metric::counter(
        "slipstream_num_preemptions_total",
        Unit::Number("preemptions"),
        "Times that a request gave its KV blocks back before its end.",
        |r| count(r.engine.counters.preemptions),
    )
    .also("vllm:num_preemptions_total"),
    Metric::counter(
        "slipstream_num_fair_preemptions_total",
        Unit::Number("preemptions"),
        "Of these, those that made room for a tenant with less than its share.",
        |r| count(r.engine.counters.fair_preemptions),
    ),
    Metric::counter(
        "slipstream_verifier_failures_total",
        Unit::Number("steps"),
        "Steps in which the verifier failed and ended the requests of its batch.",
        |r| count(r.engine.counters.verifier_failures),
    ),
    // KV blocks of the verifier.
    Metric::gauge(
        "slipstream_kv_blocks",
        Unit::Number("blocks"),
        "KV blocks of the verifier's pool, 16 positions each: free, used or cached.",
        |r| count(r.engine.num_blocks as u64),
    ),
    Metric::gauge(
        "slipstream_kv_blocks_free",
        Unit::Number("blocks"),
        "KV blocks that hold nothing of use.",
        |r| count(r.engine.num_free_blocks as u64),
    ),
    Metric::gauge(
        "slipstream_kv_blocks_used",
        Unit::Number("blocks"),
        "KV blocks that requests hold.",
        |r| count(kv_used(r) as u64),
    ),
    Metric::gauge(
        "slipstream_kv_blocks_cached",
        Unit::Number("blocks"),
        "KV blocks that only the prefix cache keeps; given up when room is needed.",
        |r| count(r.engine.num_cached_blocks as u64),
    ),
    Metric::gauge(
        "slipstream_kv_cache_usage_perc",
        Unit::Share,
        "Share of the KV blocks that requests hold.",
        kv_usage,
    )
    .also("vllm:kv_cache_usage_perc"),
    Metric::counter(
        "slipstream_kv_blocks_evicted_total",
        Unit::Number("blocks"),
        "Cached blocks given up because their room was needed.",
        |r| count(r.engine.counters.evicted_blocks),
    ),
    Metric::counter(
        "slipstream_kv_blocks_copied_total",
        Unit::Number("blocks"),
        "Shared blocks copied because a request went on behind them.",
        |r| count(r.engine.counters.copied_blocks),
    ),
    Metric::gauge(
        "slipstream_draft_kv_blocks_used",
        Unit::Number("blocks"),
        "KV blocks that the draft holds for requests.",
        |r| count(r.engine.num_draft_blocks as u64),
    ),
    Metric::counter(
        "slipstream_prefix_cache_queries_total",
        Unit::Number("tokens"),
        "Known tokens of requests that started with the prefix cache allowed.",
        |r| count(r.engine.counters.looked_up),
    )
    .also("vllm:prefix_cache_queries_total"),
    Metric::counter(
        "slipstream_prefix_cache_hits_total",
        Unit::Number("tokens"),
        "Of these, tokens whose KV was there and was not computed again.",
        |r| count(r.engine.counters.cached),
    )
    .also("vllm:prefix_cache_hits_total"),
    // Speculation.
    Metric::counter(
        "slipstream_spec_decode_num_drafts_total",
        Unit::Number("proposals"),
        "Proposals verified.",
        |r| count(r.engine.counters.drafts),
    )
    .also("vllm:spec_decode_num_drafts_total"),
    Metric::counter(
        "slipstream_spec_decode_num_draft_tokens_total",
        Unit::Number("tokens"),
        "Proposed tokens verified.",
        |r| count(r.engine.counters.proposed),
    )
    .also("vllm:spec_decode_num_draft_tokens_total"),
    Metric::counter_by(
        "slipstream_spec_decode_num_draft_tokens_per_pos_total",
        Unit::Number("tokens"),
        "Proposed tokens verified, by position in their proposal.",
        &["position"],
        |r| per_position(r, &r.engine.counters.proposed_by_position),
    ),
    Metric::counter(
        "slipstream_spec_decode_num_accepted_tokens_total",
        Unit::Number("tokens"),
        "Proposed tokens accepted.",
        |r| count(r.engine.counters.accepted),
    )
    .also("vllm:spec_decode_num_accepted_tokens_total"),
    Metric::counter_by(
        "slipstream_spec_decode_num_accepted_tokens_per_pos_total",
        Unit::Number("tokens"),
        "Proposed tokens accepted, by position in their proposal.",
        &["position"],
        |r| per_position(r, &r.engine.counters.accepted_by_position),
    )
    .also("vllm:spec_decode_num_accepted_tokens_per_pos_total"),
    Metric::counter(
        "slipstream_draft_faults_total",
        Unit::Number("steps"),
        "Steps in which the draft failed as a whole; they decoded plainly.",
        |r| count(r.engine.counters.draft_faults),
    ),
    Metric::counter(
        "slipstream_draft_dropped_proposals_total",
        Unit::Number("proposals"),
        "Proposals dropped as nonsense.",
        |r| count(r.engine.counters.dropped_proposals),
    ),
    Metric::counter(
        "slipstream_draft_quarantines_total",
        Unit::Number("quarantines"),
        "Times that a draft was put into quarantine because it kept failing.",
        |r| count(r.engine.counters.quarantines),
    ),
    Metric::gauge("slipstream_draft_installed", Unit::Flag, "Whether a draft is installed.", |r| {
        flag(r.engine.has_draft)
    }),
    Metric::gauge(
        "slipstream_draft_quarantined",
        Unit::Flag,
        "Whether the draft is in quarantine; requests are then served plainly.",
        |r| flag(r.engine.is_draft_quarantined),
    ),
    // How long requests took.
    Metric::histogram(
        "slipstream_time_to_first_token_seconds",
        Unit::Seconds,
        "From the arrival of a request to handing its first token to its stream.",
        |m| only(&m.engine.spans.first_token),
    )
    .also("vllm:time_to_first_token_seconds"),
    Metric::histogram(
        "slipstream_inter_token_latency_seconds",
        Unit::Seconds,
        "Between two events with tokens of one request, handed to its stream.",
        |m| only(&m.engine.spans.between_events),
    )
    .also("vllm:inter_token_latency_seconds"),
    Metric::histogram(
        "slipstream_request_time_per_output_token_seconds",
        Unit::Seconds,
        "Mean per token behind the first, of requests that ended with more than one.",
        |m| only(&m.engine.spans.per_token),
    )
    .also("vllm:request_time_per_output_token_seconds"),
    Metric::histogram(
        "slipstream_e2e_request_latency_seconds",
        Unit::Seconds,
        "From the arrival of a request to its end. Like all spans of whole requests, \
         without those whose client went away.",
        |m| only(&m.engine.spans.whole),
    )
    .also("vllm:e2e_request_latency_seconds"),
    Metric::histogram(
        "slipstream_request_queue_time_seconds",
        Unit::Seconds,
        "From the arrival of a request to its first computed row.",
        |m| only(&m.engine.spans.queue),
    )
    .also("vllm:request_queue_time_seconds"),
    Metric::histogram(
        "slipstream_request_prefill_time_seconds",
        Unit::Seconds,
        "From the first computed row of a request to its first token.",
        |m| only(&m.engine.spans.prefill),
    )
    .also("vllm:request_prefill_time_seconds"),
    Metric::histogram(
        "slipstream_request_decode_time_seconds",
        Unit::Seconds,
        "From the first token of a request to its end.",
        |m| only(&m.engine.spans.decode),
    )
    .also("vllm:request_decode_time_seconds"),
    Metric::histogram(
        "slipstream_request_prompt_tokens",
        Unit::Number("tokens"),
        "Prompt tokens of one request.",
        |m| only(&m.engine.spans.prompt_tokens),
    )
    .also("vllm:request_prompt_tokens"),
    Metric::histogram(
        "slipstream_request_generation_tokens",
        Unit::Number("tokens"),
        "Output tokens of one request.",
        |m| only(&m.engine.spans.output_tokens),
    )
    .also("vllm:request_generation_tokens"),
    // The server's own state.
    Metric::gauge_by(
        "slipstream_stage",
        Unit::Flag,
        "Where the server stands: 1 at the stage that it is in.",
        &["stage"],
        stages,
    ),
    Metric::gauge(
        "slipstream_engine_heartbeat_age_seconds",
        Unit::Seconds,
        "Since the engine thread last began or ended a step; grows while there is \
         nothing to do.",
        |r| seconds(r.metrics.engine.beat_age()),
    ),
    Metric::gauge(
        "slipstream_engine_step_age_seconds",
        Unit::Seconds,
        "How long the step in progress has taken; 0 between two steps.",
        |r| seconds(r.metrics.engine.step_age()),
    ),
    Metric::gauge_by(
        "slipstream_build_info",
        Unit::Flag,
        "What this program is; always 1.",
        &["version", "numerics_version", "isa"],
        |_| build(),
    ),
    Metric::gauge_by(
        "slipstream_model_info",
        Unit::Flag,
        "What it serves, once that is loaded; always 1.",
        &["model_name", "fingerprint"],
        model,
    ),
    // The process, as the operating system sees it.
    Metric::gauge(
        "slipstream_process_start_time_seconds",
        Unit::Seconds,
        "When the server started, since the beginning of 1970.",
        |r| Some(r.metrics.started_unix_seconds),
    )
    .also("process_start_time_seconds"),
    Metric::gauge(
        "slipstream_process_resident_memory_bytes",
        Unit::Bytes,
        "Memory in use; absent where the system does not say.",
        |r| r.process.resident_bytes.and_then(count),
    )
    .also("process_resident_memory_bytes"),
    Metric::gauge(
        "slipstream_process_open_fds",
        Unit::Number("files"),
        "Open file descriptors; absent where the system does not say.",
        |r| r.process.num_open_fds.and_then(count),
    )
    .also("process_open_fds"),
    // Connections.
    Metric::counter(
        "slipstream_connections_opened_total",
        Unit::Number("connections"),
        "Connections taken.",
        |r| count(r.metrics.net.opened.get()),
    ),
    Metric::counter_by(
        "slipstream_connections_closed_total",
        Unit::Number("connections"),
        "Connections that are over, by why.",
        &["reason"],
        |r| connections_closed(&r.metrics.net),
    ),
    Metric::counter(
        "slipstream_connections_refused_total",
        Unit::Number("connections"),
        "Connections closed as they came, because there were too many.",
        |r| count(r.metrics.net.refused.get()),
    ),
    Metric::counter(
        "slipstream_connections_accept_errors_total",
        Unit::Number("errors"),
        "Times that the system had no connection to give, as without file \
         descriptors.",
        |r| count(r.metrics.net.accept_errors.get()),
    ),
    Metric::gauge(
        "slipstream_connections_open",
        Unit::Number("connections"),
        "Connections that are open now.",
        |r| count(r.metrics.net.num_open()),
    ),
    Metric::counter(
        "slipstream_streams_reset_total",
        Unit::Number("streams"),
        "Streams that the server reset because their peer took nothing.",
        |r| count(r.metrics.net.streams_stalled.get()),
    ),
    // Calls.
    Metric::counter_by(
        "slipstream_grpc_calls_total",
        Unit::Number("calls"),
        "gRPC calls that have ended, by method and code; unknown methods together.",
        &["method", "code"],
        |r| r.metrics.calls.ended(),
    ),
    Metric::gauge_by(
        "slipstream_grpc_calls_in_progress",
        Unit::Number("calls"),
        "gRPC calls that have not ended.",
        &["method"],
        |r| r.metrics.calls.in_progress(),
    ),
    Metric::histogram_by(
        "slipstream_grpc_call_duration_seconds",
        Unit::Seconds,
        "How long gRPC calls took, streams to their end.",
        &["method"],
        |m| m.calls.seconds(),
    ),
    Metric::counter_by(
        "slipstream_http_requests_total",
        Unit::Number("requests"),
        "Plain HTTP requests answered, by path and status.",
        &["path", "status"],
        |r| r.metrics.http.samples(),
    ),
];
