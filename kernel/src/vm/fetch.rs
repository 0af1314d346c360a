//! The walks of the last instruction fetches, kept so that the next ones can repeat them in a few instructions.
//!
//! Without next-RIP and decode assists almost every exit reads the instruction that caused it, and mostly the same
//! few pages of code. A cache of translations would be unsound: under nested paging a guest's INVLPG makes no exit.
//! What is kept here is a walk itself: where each page-table entry is and what it was. A repeated walk reads every
//! entry again and compares; it is as fresh as a walk from the root, for the same entries lead the same way.
#![allow(unsafe_code)] // Page-table entries and code are read through pointers into guest memory.

use super::memory::HostMemory;
use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU64, Ordering};
use mmu::{BelowError, Gpa, InvalidationSeq, Shared, TableSource, Update};

/// Levels of the deepest walk.
const MAX_LEVELS: usize = 5;

/// An entry that a walk read.
#[derive(Clone, Copy)]
struct Step {
    place: *const AtomicU64,
    value: u64,
}

impl Step {
    /// Whether the entry is what it was. Only while the walk's backing is settled as it was.
    #[inline(always)]
    fn is_fresh(&self) -> bool {
        // SAFETY: the backing has not changed since the pointer was made, and its user holds the guard that keeps it
        // so; aligned guest memory may be read atomically at any time.
        unsafe { (*self.place).load(Ordering::Acquire) == self.value }
    }
}

/// What a walk depends on beside the entries and the registers that make its context.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    /// The linear page's number, and above it the privilege level: a supervisor's is the number alone.
    page: u64,
    cr3: u64,
}

/// A kept walk.
#[derive(Clone, Copy)]
struct Walk {
    key: Key,
    /// The backing as it was: the pointers are good while it is the same.
    seq: Option<InvalidationSeq>,
    /// The first three are there always: a shorter walk has its first entry more than once.
    steps: [Step; MAX_LEVELS],
    len: usize,
    /// Host pointer to the page of code.
    code: *const u8,
}

/// Walks that are kept: those of a handler and of what it was called from, in two address spaces.
const WALKS: usize = 4;

/// The kept walks.
pub(super) struct FetchCache {
    /// Copies of the last one and of another one before it: kernels fault and handle faults in turns.
    last: Walk,
    before: Walk,
    /// All of them, each in the place that its key names.
    walks: [Walk; WALKS],
    /// The [stamp](crate::hw::HwVcpu::control_stamp) of the registers in long mode that the walks are good with.
    stamp: u64,
}

/// Nobody's [stamp](crate::hw::HwVcpu::control_stamp).
pub(super) const NO_STAMP: u64 = u64::MAX;

// SAFETY: the pointers are into the VM's memory, which is shared by all CPUs; they are only used under its guard.
unsafe impl Send for FetchCache {}

impl Key {
    #[inline(always)]
    fn new(linear: u64, cr3: u64, cpl: u8) -> Self {
        Self { page: linear >> 12 | u64::from(cpl) << 62, cr3 }
    }

    /// Where a walk with this key is kept.
    fn place(&self) -> usize {
        let mixed = (self.page ^ self.cr3 >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> (u64::BITS - WALKS.ilog2())) as usize % WALKS
    }
}

impl Walk {
    const NONE: Self = Self {
        key: Key { page: 0, cr3: 0 },
        seq: None,
        steps: [Step { place: core::ptr::null(), value: 0 }; MAX_LEVELS],
        len: 0,
        code: core::ptr::null(),
    };

    /// The bytes of code at `linear`, if they lie in the page and the walk would lead there again.
    #[inline(always)]
    fn read<const N: usize>(&self, shared: &Shared<'_, HostMemory>, linear: u64) -> Option<[u8; N]> {
        let offset = (linear & 0xfff) as usize;
        if offset > 0x1000 - N || self.seq.is_none() || shared.settled() != self.seq {
            return None;
        }
        // Three levels, to a large page, and four are the rule.
        let [first, second, third, fourth, fifth] = &self.steps;
        let fresh = first.is_fresh()
            && second.is_fresh()
            && third.is_fresh()
            && (self.len <= 3 || fourth.is_fresh() && (self.len <= 4 || fifth.is_fresh()));
        if !fresh {
            return None;
        }
        // SAFETY: as in `Step::is_fresh`; the bytes lie inside the page.
        Some(unsafe { self.code.add(offset).cast::<[u8; N]>().read() })
    }
}

impl FetchCache {
    /// Nothing kept.
    pub(super) const fn new() -> Self {
        Self { last: Walk::NONE, before: Walk::NONE, walks: [Walk::NONE; WALKS], stamp: NO_STAMP }
    }

    /// Forgets the walks: the registers make another context now.
    pub(super) fn clear(&mut self) {
        self.last.seq = None;
        self.before.seq = None;
        for walk in &mut self.walks {
            walk.seq = None;
        }
    }

    /// The walks are good with the registers of `stamp`, which are those of long mode; or [`NO_STAMP`].
    pub(super) fn vouch(&mut self, stamp: u64) {
        self.stamp = stamp;
    }

    /// Bytes of a supervisor's code at `linear`, if the last walk or the one before led there and they lie in one page.
    /// `stamp` is that of the registers as they are; if the walks are good with it, they are those of long mode.
    #[inline(always)]
    pub(super) fn read_in_turns<'m, const N: usize>(
        &self,
        shared: impl FnOnce() -> Shared<'m, HostMemory>,
        linear: u64,
        cr3: u64,
        stamp: u64,
    ) -> Option<[u8; N]> {
        let key = Key::new(linear, cr3, 0);
        if stamp != self.stamp {
            None
        } else if key == self.last.key {
            self.last.read(&shared(), linear)
        } else if key == self.before.key {
            self.before.read(&shared(), linear)
        } else {
            None
        }
    }

    /// Bytes of code at `linear`, if the last walk led there and they lie in one page.
    #[inline(always)]
    pub(super) fn read<'m, const N: usize>(
        &self,
        shared: impl FnOnce() -> Shared<'m, HostMemory>,
        linear: u64,
        cr3: u64,
        cpl: u8,
    ) -> Option<[u8; N]> {
        if Key::new(linear, cr3, cpl) == self.last.key {
            self.last.read(&shared(), linear)
        } else {
            None
        }
    }

    /// Sixteen bytes, if the one before led there, or another that is kept, which then is the last one.
    pub(super) fn read_other(
        &mut self,
        shared: &Shared<'_, HostMemory>,
        linear: u64,
        cr3: u64,
        cpl: u8,
    ) -> Option<[u8; 16]> {
        let key = Key::new(linear, cr3, cpl);
        if key == self.before.key {
            return self.before.read(shared, linear);
        }
        let walk = self.walks[key.place()];
        if key != walk.key {
            return None;
        }
        self.before = core::mem::replace(&mut self.last, walk);
        self.last.read(shared, linear)
    }

    /// Keeps a walk that `recorder` watched and that led to `page`, if all of it was recorded.
    pub(super) fn keep(
        &mut self,
        shared: &Shared<'_, HostMemory>,
        recorder: &Recorder<'_, '_>,
        linear: u64,
        cr3: u64,
        cpl: u8,
        page: Gpa,
    ) {
        let key = Key::new(linear, cr3, cpl);
        let walk = &mut self.walks[key.place()];
        walk.seq = None;
        let Some((steps, len)) = recorder.steps() else { return };
        let Some(code) = shared.ram(page).and_then(|at| shared.backing().pointer(&at)) else { return };
        *walk = Walk { key, seq: shared.settled(), steps, len, code };
        if self.before.key == key || self.last.key != key {
            self.before = self.last;
        }
        self.last = *walk;
    }
}

/// A source of table entries that remembers where they were.
pub(super) struct Recorder<'s, 'm> {
    shared: &'s Shared<'m, HostMemory>,
    steps: RefCell<([Step; MAX_LEVELS], usize)>,
    /// Something happened that a repetition would have to do again: an entry was marked, or had four bytes.
    spoilt: Cell<bool>,
}

impl<'s, 'm> Recorder<'s, 'm> {
    pub(super) fn new(shared: &'s Shared<'m, HostMemory>) -> Self {
        const NONE: Step = Step { place: core::ptr::null(), value: 0 };
        Self { shared, steps: RefCell::new(([NONE; MAX_LEVELS], 0)), spoilt: Cell::new(false) }
    }

    fn steps(&self) -> Option<([Step; MAX_LEVELS], usize)> {
        let (mut steps, len) = *self.steps.borrow();
        if self.spoilt.get() || len == 0 {
            return None;
        }
        let (known, spare) = steps.split_at_mut(len);
        spare.fill(known[0]);
        Some((steps, len))
    }
}

impl TableSource<Gpa> for Recorder<'_, '_> {
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        let value = self.shared.read_u64(at)?;
        let place = self.shared.ram(at).and_then(|at| self.shared.backing().pointer(&at));
        let mut steps = self.steps.borrow_mut();
        let (places, len) = &mut *steps;
        match (place, places.get_mut(*len)) {
            (Some(place), Some(step)) => {
                *step = Step { place: place.cast(), value };
                *len += 1;
            }
            _ => self.spoilt.set(true),
        }
        Ok(value)
    }

    fn read_u32(&self, at: Gpa) -> Result<u32, BelowError> {
        self.spoilt.set(true);
        self.shared.read_u32(at)
    }

    fn update_u64(&self, at: Gpa, current: u64, new: u64) -> Result<Update, BelowError> {
        self.spoilt.set(true);
        self.shared.update_u64(at, current, new)
    }

    fn update_u32(&self, at: Gpa, current: u32, new: u32) -> Result<Update, BelowError> {
        self.spoilt.set(true);
        self.shared.update_u32(at, current, new)
    }
}
