//! Two kinds in one VM: what the shadow kind has the direct kind do, at once, when a page becomes a table that is shadowed.
use core::fmt;

use super::direct::DirectMmu;
use super::sweep::Sweep;
use crate::format::EntryFormat;
use crate::memory::{Backing, Exclusive};
use crate::tables::TableMemory;

/// A direct kind, for whoever tracks writes: see [`Exclusive::beside`].
pub trait Beside<B>: sealed::Sealed {
    /// Carries out what tracking asks for; whether a translation was taken away. The flush is requested.
    #[doc(hidden)]
    fn carry_out(&self, guard: &Exclusive<'_, B>, sweep: Sweep, track: bool) -> bool;
}

impl<B> fmt::Debug for dyn Beside<B> + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Beside")
    }
}

mod sealed {
    pub trait Sealed {}
}

impl<F: EntryFormat, M: TableMemory> sealed::Sealed for DirectMmu<F, M> {}

impl<F: EntryFormat, M: TableMemory, B: Backing> Beside<B> for DirectMmu<F, M> {
    fn carry_out(&self, guard: &Exclusive<'_, B>, mut sweep: Sweep, track: bool) -> bool {
        let mut needed = false;
        // One frame: a few entries under each root.
        while !sweep.is_done() {
            let flush = if track { self.track(guard, &mut sweep) } else { self.untrack(guard, &mut sweep) };
            needed |= flush.is_needed();
        }
        needed
    }
}
