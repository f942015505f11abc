//! Owns the order in which idle blocks go: a doubly linked list over block ids, so that blocks
//! enter and leave anywhere in constant time and without memory of their own. Knows no contents.

use slipstream_model::ids::BlockId;

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    older: Option<BlockId>,
    newer: Option<BlockId>,
    is_in: bool,
}

/// Blocks in the order in which they became idle.
#[derive(Debug)]
pub(super) struct IdleList {
    /// By block, `[num_blocks]`.
    links: Vec<Link>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
}

impl IdleList {
    /// An empty list for a pool.
    pub(super) fn new(num_blocks: usize) -> Self {
        Self { links: vec![Link::default(); num_blocks], oldest: None, newest: None }
    }

    /// The block that became idle first.
    pub(super) fn oldest(&self) -> Option<BlockId> {
        self.oldest
    }

    /// Adds a block as the newest. One that is in the list moves there.
    pub(super) fn push(&mut self, block: BlockId) {
        self.remove(block);
        let older = self.newest.replace(block);
        match older {
            Some(older) => self.links[older.index()].newer = Some(block),
            None => self.oldest = Some(block),
        }
        self.links[block.index()] = Link { older, newer: None, is_in: true };
    }

    /// Takes a block out, if it is in.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { older, newer, is_in } = std::mem::take(&mut self.links[block.index()]);
        if !is_in {
            return;
        }
        match older {
            Some(older) => self.links[older.index()].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.links[newer.index()].older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use slipstream_model::ids::BlockId;

    use super::IdleList;

    #[test]
    fn blocks_go_in_the_order_they_came_unless_taken_out() {
        let mut list = IdleList::new(6);
        let mut plain: Vec<u32> = Vec::new();
        let mut state = 7_u32;
        for _ in 0..10_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let block = (state >> 16) % 6;
            plain.retain(|&other| other != block);
            if state >> 31 == 0 {
                list.push(BlockId(block));
                plain.push(block);
            } else {
                list.remove(BlockId(block));
            }
            assert_eq!(list.oldest(), plain.first().map(|&first| BlockId(first)));
        }
        for &block in &plain {
            assert_eq!(list.oldest(), Some(BlockId(block)));
            list.remove(BlockId(block));
        }
        assert_eq!((list.oldest(), list.newest), (None, None));
    }
}
