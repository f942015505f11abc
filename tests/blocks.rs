//! Proves that block accounting cannot leak: random growing, shrinking, sharing, copying and
//! keeping by many tables over tiny pools, against a model that keeps plain lists.

use std::collections::BTreeSet;

use slipstream_model::block_manager::{BlockManager, BlockTable, OutOfBlocks};
use slipstream_model::ids::{BLOCK_LEN, BlockId};
use slipstream_tests::random::Rng;
use slipstream_tests::timing::timed;

/// A manager beside the model of what it must say.
struct World {
    manager: BlockManager,
    tables: Vec<BlockTable>,
    /// Blocks of each table, in order, as the model sees them.
    owned: Vec<Vec<BlockId>>,
}

impl World {
    fn new(num_blocks: usize, num_tables: usize) -> Self {
        Self {
            manager: BlockManager::new(num_blocks),
            tables: (0..num_tables).map(|_| BlockTable::new()).collect(),
            owned: vec![Vec::new(); num_tables],
        }
    }

    fn num_owned(&self) -> usize {
        self.owned.iter().map(Vec::len).sum()
    }

    /// Grows a table and says whether that was refused, as it must be when blocks are short.
    fn grow(&mut self, table: usize, len: usize) -> bool {
        let free = self.manager.num_blocks() - self.num_owned();
        let wanted = len.div_ceil(BLOCK_LEN).saturating_sub(self.owned[table].len());
        let result = self.manager.grow(&mut self.tables[table], len);
        if wanted > free {
            assert_eq!(result, Err(OutOfBlocks { wanted, free }));
            return true;
        }
        assert_eq!(result, Ok(()));
        let old_len = self.owned[table].len();
        let blocks = self.tables[table].blocks();
        assert_eq!(blocks.len(), old_len + wanted, "exactly what was asked for");
        let added = blocks[old_len..].to_vec();
        self.owned[table].extend(added);
        false
    }

    fn shrink(&mut self, table: usize, len: usize) {
        self.manager.shrink(&mut self.tables[table], len);
        self.owned[table].truncate(len.div_ceil(BLOCK_LEN));
    }

    fn release(&mut self, table: usize) {
        self.manager.release(&mut self.tables[table]);
        self.owned[table].clear();
    }

    /// The manager and the model agree, and no block has two owners.
    fn check(&self) {
        let mut all = BTreeSet::new();
        for (table, owned) in self.tables.iter().zip(&self.owned) {
            assert_eq!(table.blocks(), owned, "kept blocks stay where they are");
            assert_eq!(table.capacity_len(), owned.len() * BLOCK_LEN);
            for &block in owned {
                assert!(all.insert(block), "{block:?} has two owners");
                assert!(block.index() < self.manager.num_blocks(), "{block:?} is outside");
            }
        }
        assert_eq!(self.manager.num_free(), self.manager.num_blocks() - all.len());
        for index in 0..self.manager.num_blocks() {
            let block = BlockId(u32::try_from(index).unwrap());
            let is_held = self.manager.num_tables(block) > 0;
            assert_eq!(is_held, all.contains(&block), "{block:?}");
        }
    }
}

#[test]
fn random_use_of_tiny_pools_never_leaks_or_shares() {
    timed("blocks", 3.0, || {
        let mut num_refused = 0;
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let num_blocks = rng.below(12);
            let mut world = World::new(num_blocks, rng.between(1, 5));
            for _ in 0..300 {
                let table = rng.below(world.tables.len());
                let len = rng.below(num_blocks * BLOCK_LEN + 20);
                match rng.below(6) {
                    0..=2 => num_refused += usize::from(world.grow(table, len)),
                    3 | 4 => world.shrink(table, len),
                    _ => world.release(table),
                }
                world.check();
            }
            for table in 0..world.tables.len() {
                world.release(table);
            }
            assert_eq!(world.manager.num_free(), num_blocks, "seed {seed} leaks");
        }
        assert!(num_refused > 1_000, "the pools were never short");
    });
}

/// Tables that share blocks, and blocks that are kept, beside the model of what that must come to.
struct SharingWorld {
    manager: BlockManager,
    tables: Vec<BlockTable>,
    kept: BTreeSet<BlockId>,
}

impl SharingWorld {
    fn holders(&self, block: BlockId) -> usize {
        self.tables.iter().flat_map(BlockTable::blocks).filter(|held| **held == block).count()
    }

    /// Some block that can be shared, in the order of ids from a random one on.
    fn used(&self, rng: &mut Rng) -> Option<BlockId> {
        let num_blocks = self.manager.num_blocks();
        let from = rng.below(num_blocks);
        let ids = (0..num_blocks).map(|index| (from + index) % num_blocks);
        let mut ids = ids.map(|index| BlockId(u32::try_from(index).unwrap()));
        ids.find(|block| self.kept.contains(block) || self.holders(*block) > 0)
    }

    fn act(&mut self, rng: &mut Rng) {
        let table = rng.below(self.tables.len());
        let len = self.tables[table].blocks().len();
        let used = self.used(rng);
        let place = rng.below(len);
        match (rng.below(8), used) {
            (0 | 1, _) => {
                let len = rng.below(5 * BLOCK_LEN);
                let _ = self.manager.grow(&mut self.tables[table], len);
            }
            (2, _) => self.manager.shrink(&mut self.tables[table], rng.below(4 * BLOCK_LEN)),
            (3, Some(block)) => self.manager.share(&mut self.tables[table], block),
            (4, Some(block)) if len > 0 => {
                self.manager.exchange(&mut self.tables[table], place, block);
                assert_eq!(self.tables[table].blocks()[place], block);
            }
            (5, _) if len > 0 => {
                let old = self.tables[table].blocks()[place];
                let has_free = self.manager.num_free() > 0;
                let result = self.manager.replace(&mut self.tables[table], place);
                assert_eq!(result.is_ok(), has_free);
                assert_eq!(result.map_or(old, |(from, _)| from), old);
            }
            (6, _) if len > 0 => {
                let block = self.tables[table].blocks()[place];
                self.manager.keep(block);
                self.kept.insert(block);
            }
            (7, Some(block)) => {
                self.manager.drop_kept(block);
                self.kept.remove(&block);
            }
            _ => self.manager.release(&mut self.tables[table]),
        }
    }

    fn check(&self) {
        let (mut num_free, mut num_idle) = (0, 0);
        for index in 0..self.manager.num_blocks() {
            let block = BlockId(u32::try_from(index).unwrap());
            let (num_holders, is_kept) = (self.holders(block), self.kept.contains(&block));
            assert_eq!(self.manager.num_tables(block), num_holders, "{block:?}");
            assert_eq!(self.manager.is_kept(block), is_kept, "{block:?}");
            num_idle += usize::from(num_holders == 0 && is_kept);
            num_free += usize::from(num_holders == 0 && !is_kept);
        }
        assert_eq!((self.manager.num_free(), self.manager.num_idle()), (num_free, num_idle));
    }
}

#[test]
fn shared_and_kept_blocks_are_free_when_nobody_wants_them() {
    timed("blocks, shared", 3.0, || {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let num_blocks = rng.between(1, 10);
            let mut world = SharingWorld {
                manager: BlockManager::new(num_blocks),
                tables: (0..rng.between(1, 4)).map(|_| BlockTable::new()).collect(),
                kept: BTreeSet::new(),
            };
            for _ in 0..300 {
                world.act(&mut rng);
                world.check();
            }
            for table in &mut world.tables {
                world.manager.release(table);
            }
            for block in std::mem::take(&mut world.kept) {
                world.manager.drop_kept(block);
            }
            assert_eq!(world.manager.num_free(), num_blocks, "seed {seed} leaks");
        }
    });
}

#[test]
fn lengths_round_up_to_blocks() {
    for (len, wanted) in [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)] {
        assert_eq!(BlockManager::blocks_for(len), wanted, "{len} positions");
    }
}
