//! The roots that a vCPU keeps: the one it runs on and the three before, in the order of their last use.
use super::key::RootKey;
use super::requests::{RootSet, Sync};
use super::seen::Seen;
use super::Tag;
use crate::kind::{Near, Root};
use crate::mutant::{self, Mutant};

/// Roots that a vCPU keeps, the current one included.
pub(super) const ROOTS: usize = 4;

/// A root, and how far it is behind what the guest has flushed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cached {
    pub key: RootKey,
    pub root: Root,
    /// A share of it is held, to be given back.
    pub held: bool,
    /// What has to be brought up to date before it is run on.
    pub behind: Option<Sync>,
    /// Which of the vCPU's hardware tags it has, if each root has its own, and what that holds.
    pub slot: u8,
    pub tag: Tag,
    /// The registers that it was run on with last.
    pub seen: Seen,
    /// The tables that the last faults were in, the last one first.
    pub near: [Option<Near>; 2],
}

impl Cached {
    /// A new root, up to date, whose tag may hold anything.
    pub(super) const fn new(key: RootKey, root: Root, held: bool, slot: u8) -> Self {
        Self { key, root, held, behind: None, slot, tag: Tag::UNKNOWN, seen: Seen::NOTHING, near: [None; 2] }
    }

    pub(super) fn fall_behind(&mut self, how: Sync) {
        // That of the current root is kept elsewhere.
        self.tag = Tag::UNKNOWN;
        self.behind = match self.behind {
            None => Some(how),
            same if same == Some(how) => same,
            Some(_) if mutant::is(Mutant::OneSyncOfTwo) => Some(how),
            Some(_) => Some(Sync::All),
        };
    }
}

/// The roots, most recently used first, without holes.
#[derive(Debug)]
pub(super) struct RootCache {
    entries: [Option<Cached>; ROOTS],
    /// Where in `entries` each is: the most recently used first, those without a root last.
    order: [u8; ROOTS],
    /// The first is the one to run on; if not, the root for the current key is not here.
    current: bool,
}

impl RootCache {
    pub(super) const EMPTY: Self = Self { entries: [None; ROOTS], order: [0, 1, 2, 3], current: false };

    #[inline(always)]
    fn entry(&self, place: usize) -> &Option<Cached> {
        &self.entries[usize::from(self.order[place]) % ROOTS]
    }

    #[inline(always)]
    fn entry_mut(&mut self, place: usize) -> &mut Option<Cached> {
        &mut self.entries[usize::from(self.order[place]) % ROOTS]
    }

    #[inline]
    pub(super) fn current(&self) -> Option<&Cached> {
        self.entry(0).as_ref().filter(|_| self.current)
    }

    #[inline]
    pub(super) fn current_mut(&mut self) -> Option<&mut Cached> {
        let current = self.current;
        self.entry_mut(0).as_mut().filter(|_| current)
    }

    /// The one at this place, zero being that of the most recently used one.
    #[inline]
    pub(super) fn at_mut(&mut self, place: usize) -> Option<&mut Cached> {
        self.entry_mut(place).as_mut()
    }

    /// All of them, in no order.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Cached> {
        self.entries.iter_mut().flatten()
    }

    /// The place of one that `is` says is wanted.
    #[inline]
    pub(super) fn find(&self, is: impl Fn(&Cached) -> bool) -> Option<usize> {
        (0..ROOTS).find(|&place| self.entry(place).as_ref().is_some_and(&is))
    }

    /// Makes the one at `place` the current one.
    #[inline(always)]
    pub(super) fn bring_forward(&mut self, place: usize) {
        if mutant::is(Mutant::LeastRecentKept) {
            self.order.swap(0, place);
        } else {
            for before in (0..place).rev() {
                self.order.swap(before, before + 1);
            }
        }
        self.current = true;
    }

    /// Makes the root for `key` the current one, if there is one; whether there is.
    pub(super) fn select(&mut self, key: &RootKey) -> bool {
        let found = self.find(|cached| cached.key.is_same(key));
        match found {
            Some(place) => self.bring_forward(place),
            None => self.current = false,
        }
        self.current
    }

    /// Puts a root in front, as the current one. There is a place for it.
    pub(super) fn push(&mut self, cached: Cached) {
        self.order.rotate_right(1);
        *self.entry_mut(0) = Some(cached);
        self.current = true;
    }

    pub(super) fn is_full(&self) -> bool {
        self.entries.iter().all(Option::is_some)
    }

    /// Takes out the root that was used least lately, if it is not the current one.
    pub(super) fn pop(&mut self) -> Option<Cached> {
        let last = (0..ROOTS).rev().find(|&place| self.entry(place).is_some())?;
        if last == 0 && self.current {
            return None;
        }
        self.entry_mut(last).take()
    }

    /// Takes out a root that `gone` says is gone.
    pub(super) fn take(&mut self, gone: impl Fn(&Cached) -> bool) -> Option<Cached> {
        let place = self.find(gone)?;
        let taken = self.entry_mut(place).take();
        self.order[place..].rotate_left(1);
        self.current &= place != 0;
        taken
    }

    /// The roots whose key `covers`, most recently used first.
    pub(super) fn roots(&self, covers: impl Fn(&RootKey) -> bool) -> [Option<Root>; ROOTS] {
        let covered = |cached: &&Cached| covers(&cached.key);
        core::array::from_fn(|place| self.entry(place).as_ref().filter(covered).map(|cached| cached.root))
    }

    /// A number that no root here has.
    pub(super) fn free_slot(&self) -> u8 {
        let used = |slot: &u8| self.entries.iter().flatten().any(|entry| entry.slot == *slot);
        (0..ROOTS as u8).find(|slot| !used(slot)).unwrap_or(0)
    }

    /// Forgets which registers the roots were run on with.
    pub(super) fn forget_seen(&mut self) {
        self.iter_mut().for_each(|cached| cached.seen = Seen::NOTHING);
    }

    /// Notes that roots are behind by `how`: those at places from `first` on whose key `covers`, direct ones
    /// excepted, which follow from the slots.
    #[inline]
    pub(super) fn mark_from(&mut self, first: usize, how: Sync, covers: impl Fn(&RootKey) -> bool) {
        for &at in &self.order[first..] {
            let Some(entry) = &mut self.entries[usize::from(at) % ROOTS] else { break };
            // One that is behind by all has nothing to lose.
            if entry.behind != Some(Sync::All) && !entry.key.role().is_direct() && covers(&entry.key) {
                entry.fall_behind(how);
            }
        }
    }

    /// Notes that the roots which `covers` says are behind by `how`; which those are. Direct roots never are: they
    /// follow from the slots.
    pub(super) fn mark(&mut self, how: Sync, covers: impl Fn(&RootKey) -> bool) -> RootSet {
        let mut marked = RootSet::empty();
        let first = usize::from(!self.current);
        let last = if mutant::is(Mutant::FlushCurrentOnly) { 1 } else { ROOTS };
        for place in 0..last {
            let Some(entry) = self.at_mut(place).filter(|entry| !entry.key.role().is_direct()) else {
                continue;
            };
            if covers(&entry.key) {
                entry.fall_behind(how);
                // With four previous roots, the last is dropped by the load that is due.
                marked |= RootSet::from_bits_truncate(1 << (place + first));
            }
        }
        marked
    }
}
