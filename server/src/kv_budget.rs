//! Owns how many KV blocks there are: one budget of memory for the pools of verifier and draft,
//! which have a block each for the same positions. Knows sizes, not contents.

use std::fmt;

use slipstream_model::ids::BLOCK_LEN;
use slipstream_model::kv_pool::KvPool;
use slipstream_model::load::LoadedModel;
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};

use crate::config::{ByteCount, KvSize};
use crate::startup::StartupError;

/// Of the memory that is free once the models are loaded, one in this many bytes is for KV. The
/// rest is for packing weights, for what else the machine does, and for a margin: KV is claimed
/// when it is first written, so a pool that was too large would fail hours later.
const SHARE_OF_FREE: u64 = 2;
/// How often all running requests fit with their full contexts at most: once for themselves, once
/// for the prefixes of those before them. What is beyond that would hardly ever be read again.
const FULL_CONTEXTS: u64 = 2;
/// The budget where the system does not say what is free.
const BLIND_BYTES: u64 = 1 << 30;
/// Most blocks: ids are 32 bits wide.
const BLOCKS_MAX: u64 = u32::MAX as u64;

/// Memory that one KV block takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockBytes {
    verifier: u64,
    /// Zero without a draft.
    draft: u64,
}

impl BlockBytes {
    fn of(verifier: &LoadedModel, draft: Option<&LoadedModel>) -> Self {
        let bytes = |model: &LoadedModel| {
            let bytes = KvPool::num_bytes_for(&model.config, model.kv_type, 1);
            bytes.expect("the loader bounds every length") as u64
        };
        Self { verifier: bytes(verifier), draft: draft.map_or(0, bytes) }
    }

    /// Of both.
    fn sum(self) -> u64 {
        self.verifier + self.draft
    }
}

/// Why there are as many blocks as there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// They were set.
    Blocks,
    /// Their memory was set.
    Memory { bytes: u64 },
    /// A share of what was free.
    Free { bytes: u64 },
    /// More would be of no use.
    Contexts { max_running: usize },
    /// Nobody knows what is free.
    Blind,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks => write!(f, "--kv-blocks"),
            Self::Memory { bytes } => write!(f, "--kv-memory {}", ByteCount(*bytes)),
            Self::Free { bytes } => {
                write!(f, "1/{SHARE_OF_FREE} of {} MiB that were free", bytes >> 20)
            }
            Self::Contexts { max_running } => write!(
                f,
                "{FULL_CONTEXTS} x --max-running {max_running} full contexts; more would be of no \
                 use"
            ),
            Self::Blind => {
                write!(f, "{}: the system does not say what is free", ByteCount(BLIND_BYTES))
            }
        }
    }
}

/// The size of both pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KvBudget {
    /// Blocks of either pool.
    pub(crate) num_blocks: usize,
    block_bytes: BlockBytes,
    origin: Origin,
}

impl KvBudget {
    /// What the settings give for these models, which are in memory already.
    ///
    /// # Errors
    /// [`StartupError::KvPool`] for no block at all, and for more than there are ids for.
    pub(crate) fn new(
        size: KvSize,
        verifier: &LoadedModel,
        draft: Option<&LoadedModel>,
        max_running: usize,
    ) -> Result<Self, StartupError> {
        let block_bytes = BlockBytes::of(verifier, draft);
        let context_blocks = verifier.config.context_len.div_ceil(BLOCK_LEN) as u64;
        let useful = Useful { context_blocks, max_running };
        let (blocks, origin) = num_blocks(size, block_bytes.sum(), useful, free_bytes);
        match usize::try_from(blocks) {
            Ok(num_blocks) if num_blocks >= 1 && blocks <= BLOCKS_MAX => {
                Ok(Self { num_blocks, block_bytes, origin })
            }
            Ok(_) | Err(_) => Err(StartupError::KvPool {
                blocks,
                block_bytes: block_bytes.sum(),
                limit: BLOCKS_MAX,
            }),
        }
    }

    /// Tells how many tokens fit, what that takes, and why it is so many.
    pub(crate) fn log(&self) {
        let blocks = self.num_blocks as u64;
        let Self { block_bytes: BlockBytes { verifier, draft }, origin, .. } = self;
        tracing::info!(
            capacity_tokens = self.num_blocks * BLOCK_LEN,
            verifier_bytes = blocks * verifier,
            draft_bytes = blocks * draft,
            from = %origin,
            "KV memory"
        );
    }
}

/// What bounds the use of blocks.
#[derive(Clone, Copy, Debug)]
struct Useful {
    /// Blocks of one full context.
    context_blocks: u64,
    max_running: usize,
}

/// How many blocks there shall be, and why. `free_bytes` is asked only where it matters.
fn num_blocks(
    size: KvSize,
    block_bytes: u64,
    useful: Useful,
    free_bytes: impl FnOnce() -> Option<u64>,
) -> (u64, Origin) {
    match size {
        KvSize::Blocks(blocks) => (blocks as u64, Origin::Blocks),
        KvSize::Bytes(bytes) => (bytes / block_bytes, Origin::Memory { bytes }),
        KvSize::Auto => {
            let Useful { context_blocks, max_running } = useful;
            let contexts = FULL_CONTEXTS.saturating_mul(max_running as u64);
            let most = context_blocks.saturating_mul(contexts);
            let (bytes, origin) = match free_bytes() {
                Some(bytes) => (bytes / SHARE_OF_FREE, Origin::Free { bytes }),
                None => (BLIND_BYTES, Origin::Blind),
            };
            let affordable = (bytes / block_bytes).max(1);
            if most <= affordable {
                (most, Origin::Contexts { max_running })
            } else {
                (affordable, origin)
            }
        }
    }
}

/// Memory that this process can still take: what the machine has available, and no more than the
/// limits of its control groups leave. `None` where the system does not say.
fn free_bytes() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let available = Some(system.available_memory()).filter(|bytes| *bytes > 0)?;
    let limits = sysinfo::get_current_pid().ok().and_then(|id| {
        let nothing = ProcessRefreshKind::nothing();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&[id]), false, nothing);
        system.process(id)?.cgroup_limits()
    });
    // Pages of files that were read count as used in a group, and go as soon as room is needed.
    let left = limits.map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
    Some(available.min(left))
}

#[cfg(test)]
mod tests {
    use super::{BLIND_BYTES, Origin, Useful, free_bytes, num_blocks};
    use crate::config::KvSize;

    /// Bytes of a block.
    const BLOCK: u64 = 1000;
    const USEFUL: Useful = Useful { context_blocks: 10, max_running: 4 };

    #[test]
    fn what_is_set_is_taken_and_pays_for_both_pools() {
        let unasked = || panic!("nobody needs to know what is free");
        let of = |size| num_blocks(size, BLOCK, USEFUL, unasked);
        assert_eq!(of(KvSize::Blocks(7)), (7, Origin::Blocks));
        assert_eq!(of(KvSize::Bytes(5999)), (5, Origin::Memory { bytes: 5999 }));
        assert_eq!(of(KvSize::Bytes(999)).0, 0);
    }

    #[test]
    fn half_of_what_is_free_up_to_what_is_of_use() {
        let of = |free| num_blocks(KvSize::Auto, BLOCK, USEFUL, || free);
        assert_eq!(of(Some(100_000)), (50, Origin::Free { bytes: 100_000 }));
        assert_eq!(of(Some(159_999)).0, 79);
        assert_eq!(of(Some(160_000)), (80, Origin::Contexts { max_running: 4 }));
        assert_eq!(of(Some(u64::MAX)).0, 80);
        assert_eq!(of(Some(0)).0, 1, "a server that cannot start is worse than a tiny one");
        assert_eq!(of(None).0, 80);
        let huge = Useful { context_blocks: u64::MAX, max_running: usize::MAX };
        let blind = num_blocks(KvSize::Auto, BLOCK, huge, || None);
        assert_eq!(blind, (BLIND_BYTES / BLOCK, Origin::Blind));
    }

    #[test]
    fn this_machine_says_what_is_free() {
        if cfg!(target_os = "linux") {
            let free = free_bytes().expect("Linux says so");
            assert!(free > 1 << 20, "{free} bytes are free");
        }
    }
}
