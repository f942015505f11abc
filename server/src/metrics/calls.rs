//! Owns what is counted of gRPC calls: by method and code, and how long they took. Knows methods by
//! name only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::Histogram;
use slipstream_model::clock::{Clock, Micros};
use tonic::Code;

use super::buckets;
use super::metric::{Observed, Sample};
use super::tally::{Label, Tally};
use crate::grpc::methods::METHODS;

/// How all other methods are shown.
const OTHER: &str = "other";

/// Every code at its number, with the name that the gRPC specification gives it.
const CODES: [(Code, &str); 17] = [
    (Code::Ok, "OK"),
    (Code::Cancelled, "CANCELLED"),
    (Code::Unknown, "UNKNOWN"),
    (Code::InvalidArgument, "INVALID_ARGUMENT"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
    (Code::NotFound, "NOT_FOUND"),
    (Code::AlreadyExists, "ALREADY_EXISTS"),
    (Code::PermissionDenied, "PERMISSION_DENIED"),
    (Code::ResourceExhausted, "RESOURCE_EXHAUSTED"),
    (Code::FailedPrecondition, "FAILED_PRECONDITION"),
    (Code::Aborted, "ABORTED"),
    (Code::OutOfRange, "OUT_OF_RANGE"),
    (Code::Unimplemented, "UNIMPLEMENTED"),
    (Code::Internal, "INTERNAL"),
    (Code::Unavailable, "UNAVAILABLE"),
    (Code::DataLoss, "DATA_LOSS"),
    (Code::Unauthenticated, "UNAUTHENTICATED"),
];

/// Counts of gRPC calls.
pub(crate) struct CallCounters {
    clock: Arc<dyn Clock>,
    methods: Vec<Method>,
}

/// The calls of one method.
struct Method {
    name: &'static str,
    ended: Tally<{ CODES.len() }>,
    in_progress: AtomicU64,
    seconds: Histogram,
}

/// A code as a label.
#[derive(Clone, Copy)]
struct CodeLabel(Code);

impl Label for CodeLabel {
    const ALL: &'static [Self] = &[];

    fn index(self) -> usize {
        self.0 as usize
    }

    fn name(self) -> &'static str {
        CODES[self.index()].1
    }
}

impl CallCounters {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        let known = METHODS.iter().map(|method| method.path.trim_start_matches('/'));
        let names = known.chain([OTHER]);
        let methods = names.map(|name| Method {
            name,
            ended: Tally::default(),
            in_progress: AtomicU64::new(0),
            seconds: buckets::histogram(buckets::REQUEST_SECONDS),
        });
        Self { clock, methods: methods.collect() }
    }

    /// Counts a call of the method at `index` of [`METHODS`], or of an unknown one, until what this
    /// returns is dropped.
    pub(crate) fn begin(self: &Arc<Self>, index: Option<usize>) -> CallInProgress {
        let index = index.unwrap_or(METHODS.len());
        self.methods[index].in_progress.fetch_add(1, Ordering::Relaxed);
        let began = self.clock.now();
        CallInProgress { counters: Arc::clone(self), index, began, code: Code::Cancelled }
    }

    /// Calls that have ended, by method and code. Pairs that never occurred are left out, except
    /// for OK.
    pub(crate) fn ended(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        for method in &self.methods {
            for (code, name) in CODES {
                let count = method.ended.at(CodeLabel(code).index());
                if count > 0 || code == Code::Ok {
                    samples.push((vec![method.name.to_owned(), name.to_owned()], count as f64));
                }
            }
        }
        samples
    }

    /// Calls in progress, by method.
    pub(crate) fn in_progress(&self) -> Vec<Sample> {
        let methods = self.methods.iter();
        methods
            .map(|method| {
                let count = method.in_progress.load(Ordering::Relaxed);
                (vec![method.name.to_owned()], count as f64)
            })
            .collect()
    }

    /// How long calls took, by method.
    pub(super) fn seconds(&self) -> Vec<Observed<'_>> {
        let methods = self.methods.iter();
        methods.map(|method| (vec![method.name.to_owned()], &method.seconds)).collect()
    }
}

/// One call in progress. Dropped without a code it counts as cancelled: its peer went away.
pub(crate) struct CallInProgress {
    counters: Arc<CallCounters>,
    index: usize,
    began: Micros,
    code: Code,
}

impl CallInProgress {
    /// The method, as the metrics name it.
    pub(crate) fn method(&self) -> &'static str {
        self.counters.methods[self.index].name
    }

    /// How long it has been going on.
    pub(crate) fn age(&self) -> Micros {
        self.counters.clock.now().since(self.began)
    }

    /// What it ends with as far as is known.
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The call has its code; it ends when this is dropped.
    pub(crate) fn has_code(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for CallInProgress {
    fn drop(&mut self) {
        let method = &self.counters.methods[self.index];
        method.seconds.observe(self.age().0 as f64 / 1e6);
        method.ended.add(CodeLabel(self.code));
        method.in_progress.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slipstream_model::clock::MonotonicClock;
    use tonic::Code;

    use super::{CODES, CallCounters};
    use crate::grpc::methods::index_of;

    #[test]
    fn codes_stand_at_their_numbers() {
        for (index, (code, _)) in CODES.into_iter().enumerate() {
            assert_eq!(code as usize, index);
        }
    }

    #[test]
    fn a_call_counts_once_by_method_and_code() {
        let calls = Arc::new(CallCounters::new(Arc::new(MonotonicClock::start())));
        let mut good = calls.begin(index_of("/slipstream.v1.Completions/Complete"));
        let gone = calls.begin(index_of("/slipstream.v1.Completions/Complete"));
        let odd = calls.begin(index_of("/made.up/Method"));
        let running = |name: &str| {
            let samples = calls.in_progress();
            samples.into_iter().find(|(labels, _)| labels[0] == name).unwrap().1
        };
        assert_eq!(running("slipstream.v1.Completions/Complete"), 2.0);
        assert_eq!(running("other"), 1.0);
        good.has_code(Code::Ok);
        drop((good, gone, odd));
        assert_eq!(running("slipstream.v1.Completions/Complete") + running("other"), 0.0);
        let ended = calls.ended();
        let count = |method: &str, code: &str| {
            let found = ended.iter().find(|(labels, _)| labels[0] == method && labels[1] == code);
            found.map(|(_, count)| *count)
        };
        assert_eq!(count("slipstream.v1.Completions/Complete", "OK"), Some(1.0));
        assert_eq!(count("slipstream.v1.Completions/Complete", "CANCELLED"), Some(1.0));
        assert_eq!(count("other", "CANCELLED"), Some(1.0));
        assert_eq!(count("other", "UNKNOWN"), None);
    }
}
