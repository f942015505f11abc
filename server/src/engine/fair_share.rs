//! Owns how much each tenant has been served: the virtual token counters of Sheng et al., "Fairness
//! in Serving Large Language Models" (arXiv 2401.00588, algorithm 2). Knows tenants and counts; the
//! scheduler decides what follows from them.

use std::collections::BTreeMap;

use super::request::TenantId;

/// What a computed prompt token counts.
const PROMPT_WEIGHT: u64 = 1;
/// What an output token counts; both weights are those of the paper's evaluation.
const OUTPUT_WEIGHT: u64 = 2;
/// Virtual tokens by which a tenant that comes back may be behind the others: what it asks for
/// after a pause goes before the backlog of those who never pause.
const CREDIT: u64 = 1024;
/// Tenants without requests that are remembered because they are ahead of others. Beyond that all
/// of them are forgotten, so that nobody can fill the memory with names.
const ABSENT_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    /// Virtual tokens served.
    service: u64,
    /// Requests that wait or run.
    num_live: usize,
}

/// The counters of all tenants.
#[derive(Debug, Default)]
pub(super) struct FairShare {
    tenants: BTreeMap<TenantId, Tenant>,
    num_absent: usize,
}

impl FairShare {
    /// A request of `tenant` begins to wait. One that had none starts nearly level with the least
    /// served of the others: a long time without requests is no more credit than a short one.
    pub(super) fn arrives(&mut self, tenant: TenantId) {
        let least = self.least();
        let is_known = self.tenants.contains_key(&tenant);
        let entry = self.tenants.entry(tenant).or_default();
        if entry.num_live == 0 {
            entry.service = entry.service.max(least.unwrap_or(0).saturating_sub(CREDIT));
            self.num_absent -= usize::from(is_known);
        }
        entry.num_live += 1;
    }

    /// A request of `tenant` has ended.
    pub(super) fn leaves(&mut self, tenant: TenantId) {
        let Some(entry) = self.tenants.get_mut(&tenant) else { return };
        entry.num_live -= 1;
        if entry.num_live > 0 {
            return;
        }
        self.num_absent += 1;
        let least = self.least();
        if self.num_absent > ABSENT_MAX || least.is_none() {
            self.tenants.retain(|_, tenant| tenant.num_live > 0);
            self.num_absent = 0;
        }
    }

    /// The least service of a tenant with requests.
    fn least(&self) -> Option<u64> {
        let live = self.tenants.values().filter(|tenant| tenant.num_live > 0);
        live.map(|tenant| tenant.service).min()
    }

    /// Counts what a tenant got.
    pub(super) fn charge(&mut self, tenant: TenantId, prompt_len: usize, output_len: usize) {
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.service += PROMPT_WEIGHT * prompt_len as u64 + OUTPUT_WEIGHT * output_len as u64;
        }
    }

    /// What a tenant got so far.
    pub(super) fn service(&self, tenant: TenantId) -> u64 {
        self.tenants.get(&tenant).map_or(0, |tenant| tenant.service)
    }

    /// Requests of a tenant that wait or run.
    pub(super) fn num_live(&self, tenant: TenantId) -> usize {
        self.tenants.get(&tenant).map_or(0, |tenant| tenant.num_live)
    }

    /// Tenants with requests.
    pub(super) fn num_active(&self) -> usize {
        self.tenants.len() - self.num_absent
    }
}

#[cfg(test)]
mod tests {
    use super::{ABSENT_MAX, CREDIT, FairShare};
    use crate::engine::request::TenantId;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    #[test]
    fn who_comes_back_has_little_credit_and_keeps_its_debt() {
        let mut share = FairShare::default();
        share.arrives(A);
        share.charge(A, 4_000, 500);
        assert_eq!(share.service(A), 5_000);
        share.arrives(B);
        assert_eq!(share.service(B), 5_000 - CREDIT, "nearly level with the least served");
        share.charge(B, 10, 0);
        share.leaves(A);
        share.arrives(A);
        assert_eq!(share.service(A), 5_000);
        share.charge(A, 500, 0);
        share.leaves(A);
        share.arrives(A);
        assert_eq!(share.service(A), 5_500, "leaving is no way out of debt");
        assert_eq!((share.num_active(), share.num_live(A)), (2, 1));
    }

    #[test]
    fn names_do_not_fill_the_memory() {
        let mut share = FairShare::default();
        share.arrives(A);
        for name in 0..3 * ABSENT_MAX as u128 {
            share.arrives(TenantId(10 + name));
            share.leaves(TenantId(10 + name));
            assert!(share.tenants.len() <= ABSENT_MAX + 2);
        }
        assert_eq!(share.num_active(), 1);
        share.leaves(A);
        assert_eq!((share.num_active(), share.tenants.len()), (0, 0));
    }
}
