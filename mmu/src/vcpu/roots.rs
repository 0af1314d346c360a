//! The roots that a vCPU keeps: the one it runs on and the three before, in the order of their last use.
use super::key::RootKey;
use super::requests::{RootSet, Sync};
use super::Tag;
use crate::kind::Root;
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
}

/// The roots, most recently used first, without holes.
#[derive(Debug)]
pub(super) struct RootCache {
    entries: [Option<Cached>; ROOTS],
    /// The first is the one to run on; if not, the root for the current key is not here.
    current: bool,
}

impl RootCache {
    pub(super) const EMPTY: Self = Self { entries: [None; ROOTS], current: false };

    pub(super) fn current(&self) -> Option<&Cached> {
        self.entries[0].as_ref().filter(|_| self.current)
    }

    pub(super) fn current_mut(&mut self) -> Option<&mut Cached> {
        self.entries[0].as_mut().filter(|_| self.current)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Cached> {
        self.entries.iter_mut().flatten()
    }

    /// Makes the root for `key` the current one, if there is one; whether there is.
    pub(super) fn select(&mut self, key: &RootKey) -> bool {
        let found = self.entries.iter().position(|entry| entry.is_some_and(|entry| entry.key == *key));
        if let Some(index) = found {
            if mutant::is(Mutant::LeastRecentKept) {
                self.entries.swap(0, index);
            } else {
                self.entries[..=index].rotate_right(1);
            }
        }
        self.current = found.is_some();
        self.current
    }

    /// Puts a root in front, as the current one. There is a place for it.
    pub(super) fn push(&mut self, cached: Cached) {
        self.entries.rotate_right(1);
        self.entries[0] = Some(cached);
        self.current = true;
    }

    pub(super) fn is_full(&self) -> bool {
        self.entries.iter().all(Option::is_some)
    }

    /// Takes out the root that was used least lately, if it is not the current one.
    pub(super) fn pop(&mut self) -> Option<Cached> {
        let last = self.entries.iter().rposition(Option::is_some)?;
        if last == 0 && self.current {
            return None;
        }
        self.entries[last].take()
    }

    /// Takes out a root that `gone` says is gone.
    pub(super) fn take(&mut self, gone: impl Fn(&Cached) -> bool) -> Option<Cached> {
        let index = self.entries.iter().position(|entry| entry.as_ref().is_some_and(&gone))?;
        let taken = self.entries[index].take();
        self.entries[index..].rotate_left(1);
        self.current &= index != 0;
        taken
    }

    /// The roots whose key `covers`, most recently used first.
    pub(super) fn roots(&self, covers: impl Fn(&RootKey) -> bool) -> [Option<Root>; ROOTS] {
        self.entries.map(|entry| entry.filter(|cached| covers(&cached.key)).map(|cached| cached.root))
    }

    /// A number that no root here has.
    pub(super) fn free_slot(&self) -> u8 {
        let used = |slot: &u8| self.entries.iter().flatten().any(|entry| entry.slot == *slot);
        (0..ROOTS as u8).find(|slot| !used(slot)).unwrap_or(0)
    }

    /// Notes that the roots which `covers` says are behind by `how`; which those are. Direct roots never are: they follow
    /// from the slots.
    pub(super) fn mark(&mut self, how: Sync, covers: impl Fn(&RootKey) -> bool) -> RootSet {
        let mut marked = RootSet::empty();
        let first = usize::from(!self.current);
        let last = if mutant::is(Mutant::FlushCurrentOnly) { 1 } else { ROOTS };
        for (index, entry) in self.entries.iter_mut().take(last).enumerate() {
            let Some(entry) = entry.as_mut().filter(|entry| !entry.key.role().is_direct()) else { continue };
            if covers(&entry.key) {
                // That of the current root is kept elsewhere.
                entry.tag = Tag::UNKNOWN;
                entry.behind = match entry.behind {
                    None => Some(how),
                    same if same == Some(how) => same,
                    Some(_) if mutant::is(Mutant::OneSyncOfTwo) => Some(how),
                    Some(_) => Some(Sync::All),
                };
                // With four previous roots, the last is dropped by the load that is due.
                marked |= RootSet::from_bits_truncate(1 << (index + first));
            }
        }
        marked
    }
}
