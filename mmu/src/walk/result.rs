//! All of a walk: what a shadow of a guest's tables is made from.
use super::context::{PagingContext, Translation};
use super::walker::{DIRTY, EPT_DIRTY, GLOBAL, KEY_SHIFT};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::Address;
use crate::level::Level;
use crate::mutant::{self, Mutant};
use crate::role::PagingMode;

/// Entries that a walk has at most.
pub(super) const MAX_STEPS: usize = 5;

/// An entry that a walk has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep<Out> {
    /// Level of its table.
    pub level: Level,
    /// Where it is: its frame is the table's.
    pub at: Out,
    /// Its value, after the walk has marked it.
    pub entry: u64,
    /// What the entries above it permit, itself not included: the access that a shadow of its table is made for.
    pub parents: Prot,
}

/// A walk that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestWalk<Out> {
    /// Where the address leads, and what all levels permit.
    pub translation: Translation<Out>,
    /// What a shadow may permit as things are: without writes, if the leaf is clean, so that the first one is noticed.
    pub shadow_prot: Prot,
    /// Level of the leaf.
    pub level: Level,
    /// The leaf's protection key, whether or not keys are on.
    pub key: u8,
    /// The leaf's global bit, whether or not CR4.PGE is set.
    pub global: bool,
    /// The leaf is dirty.
    pub dirty: bool,
    /// PAE: the page-directory pointer, which is no step, for it restricts nothing and may be a register.
    pub pdpte: Option<u64>,
    pub(super) steps: [WalkStep<Out>; MAX_STEPS],
    pub(super) len: usize,
}

impl<Out: Address> GuestWalk<Out> {
    #[inline(never)]
    pub(super) fn new<In: Address>(
        context: &PagingContext<In, Out>,
        translation: Translation<Out>,
        trail: &Trail,
        access: Access,
    ) -> Self {
        let role = context.role();
        let ept = role.is_ept();
        let none =
            WalkStep { level: Level::L1, at: Out::from_bits_truncate(0), entry: 0, parents: Prot::empty() };
        let (mut steps, mut len) = ([none; MAX_STEPS], 0);
        let mut all = u64::MAX;
        let mut level = trail.leaf.ordinal() + trail.len;
        for (step, place) in trail.steps.iter().take(trail.len).zip(&mut steps) {
            level -= 1;
            let raw = if ept { step.entry } else { step.entry ^ context.flip };
            let above = if mutant::is(Mutant::StepRightsOfItself) { all & raw } else { all };
            let parents = if ept { context.prot_by_ept(above) } else { context.prot(above) };
            let at = Out::from_bits_truncate(step.at);
            *place = WalkStep { level: Level::ALL[level % Level::ALL.len()], at, entry: step.entry, parents };
            all = if mutant::is(Mutant::StepRightsOfOneParent) { raw } else { all & raw };
            len += 1;
        }
        let leaf = trail.leaf_entry().unwrap_or(0);
        let long_entries = !ept && !matches!(role.mode(), PagingMode::TwoLevel | PagingMode::Unpaged);
        // Without paging, or without flags, there is nothing that a write would have to set.
        let keeps = role.keeps_accessed_dirty() && role.mode() != PagingMode::Unpaged;
        let dirty = !keeps || leaf & if ept { EPT_DIRTY } else { DIRTY } != 0;
        let mut shadow_prot = translation.prot;
        // A write that could not mark the leaf, in read-only memory, was a write all the same.
        let kept = mutant::is(Mutant::ShadowWriteWithoutDirty)
            || mutant::is(Mutant::CleanHugeWritable) && trail.leaf > Level::L1;
        if !dirty && access.kind != AccessKind::Write && !kept {
            shadow_prot.remove(Prot::WRITE);
        }
        Self {
            translation,
            shadow_prot,
            level: trail.leaf,
            key: if long_entries { (leaf >> KEY_SHIFT & 15) as u8 } else { 0 },
            global: !ept && leaf & GLOBAL != 0,
            dirty,
            pdpte: trail.pdpte,
            steps,
            len,
        }
    }

    /// The entries, from the top to the leaf.
    pub fn steps(&self) -> &[WalkStep<Out>] {
        self.steps.get(..self.len).unwrap_or(&self.steps)
    }

    /// The entry at `level`, if the walk had one there.
    pub fn step(&self, level: Level) -> Option<&WalkStep<Out>> {
        self.steps().iter().find(|step| step.level == level)
    }
}

/// An entry of a trail.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub(super) at: u64,
    pub(super) entry: u64,
}

/// The entries of a walk, top first, as the walk passes them.
#[derive(Clone, Copy)]
pub(super) struct Trail {
    steps: [Step; MAX_STEPS],
    len: usize,
    leaf: Level,
    pdpte: Option<u64>,
}

impl Trail {
    pub(super) const fn new() -> Self {
        Self { steps: [Step { at: 0, entry: 0 }; MAX_STEPS], len: 0, leaf: Level::L1, pdpte: None }
    }

    pub(super) fn push(&mut self, at: u64, entry: u64) {
        if let Some(step) = self.steps.get_mut(self.len) {
            *step = Step { at, entry };
            self.len += 1;
        }
    }

    /// The walk has ended at a leaf of level `leaf`.
    pub(super) fn end(&mut self, leaf: Level, pdpte: Option<u64>) {
        (self.leaf, self.pdpte) = (leaf, pdpte);
    }

    /// Level of the leaf.
    pub(super) fn leaf(&self) -> Level {
        self.leaf
    }

    pub(super) fn leaf_entry(&self) -> Option<u64> {
        Some(self.steps.get(self.len.checked_sub(1)?)?.entry)
    }

    /// Levels of the entries, top first.
    fn levels(&self) -> impl Iterator<Item = Level> {
        let highest = (self.leaf.ordinal() + self.len).min(Level::ALL.len());
        Level::ALL.into_iter().take(highest).rev()
    }

    pub(super) fn steps_mut(&mut self) -> impl Iterator<Item = (Level, &mut Step)> {
        self.levels().zip(self.steps.iter_mut().take(self.len))
    }
}
