//! Guest memory as one address space sees it.
use core::marker::PhantomData;

use super::{RamAddr, Space, VmMemory};
use crate::addr::Gpa;

/// Guest memory as one space sees it, under the shared guard that it was [asked of](crate::Shared::in_space): walks of a vCPU in
/// system-management mode read through that of [`Space::Smm`].
#[derive(Debug)]
pub struct SpaceView<'g, B> {
    memory: &'g VmMemory<B>,
    space: Space,
    /// As its guard, it stays on its CPU.
    _not_send: PhantomData<*const ()>,
}

impl<B> Clone for SpaceView<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for SpaceView<'_, B> {}

impl<'g, B> SpaceView<'g, B> {
    #[inline(always)]
    pub(super) const fn of(memory: &'g VmMemory<B>, space: Space) -> Self {
        Self { memory, space, _not_send: PhantomData }
    }

    #[inline(always)]
    pub(super) const fn memory(&self) -> &'g VmMemory<B> {
        self.memory
    }

    /// The space.
    #[inline(always)]
    pub const fn space(&self) -> Space {
        self.space
    }

    /// The place in RAM that `gpa` names.
    #[inline(always)]
    pub fn ram(&self, gpa: Gpa) -> Option<RamAddr> {
        Some(self.memory.find_slot(self.space, gpa)?.ram())
    }
}
