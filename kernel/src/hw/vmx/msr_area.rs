//! MSR areas: what entries load for the guest and exits load for the host, for CPUs whose controls do not switch EFER or PAT
//! by themselves. SDM vol. 3, 25.7.2, 25.8.2 and table 25-14.
#![allow(unsafe_code)] // The areas are shared with the processor.

use super::choice::Controls;
use crate::cpu::msr;
use crate::hw::OutOfMemory;
use crate::mm::{self, FrameSize, Zone};
use core::mem::{offset_of, size_of};
use core::ptr::NonNull;
use x86_64::PhysAddr;

/// An entry of an area. SDM vol. 3, table 25-14.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
struct Entry {
    index: u32,
    reserved: u32,
    value: u64,
}

const _: () = assert!(size_of::<Entry>() == 16 && offset_of!(Entry, value) == 8);

/// MSRs that may have to be switched this way.
const CANDIDATES: usize = 2;

/// Both areas of a vCPU, in one page.
#[repr(C)]
struct Page {
    guest: [Entry; CANDIDATES],
    host: [Entry; CANDIDATES],
}

/// The areas of a vCPU; no memory where the controls do all.
#[derive(Debug)]
pub(super) struct MsrAreas {
    page: Option<(PhysAddr, NonNull<Page>)>,
    indices: [u32; CANDIDATES],
    len: u32,
}

impl MsrAreas {
    /// Areas for what `controls` do not switch.
    pub(super) fn new(controls: &Controls) -> Result<Self, OutOfMemory> {
        let mut areas = Self { page: None, indices: [0; CANDIDATES], len: 0 };
        for (index, switched) in [(msr::EFER, controls.switch_efer()), (msr::PAT, controls.switch_pat())] {
            if !switched {
                areas.indices[areas.len as usize] = index;
                areas.len += 1;
            }
        }
        if areas.len != 0 {
            let frame = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any).ok_or(OutOfMemory)?;
            let page = NonNull::new(mm::phys_to_virt(frame).cast()).ok_or(OutOfMemory)?;
            areas.page = Some((frame, page));
        }
        Ok(areas)
    }

    /// Entries of each area.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Physical addresses of the guest's and the host's area.
    pub(super) fn addresses(&self) -> Option<(PhysAddr, PhysAddr)> {
        self.page
            .map(|(frame, _)| (frame + offset_of!(Page, guest) as u64, frame + offset_of!(Page, host) as u64))
    }

    /// Sets what the guest gets; nothing if the MSR is not switched this way.
    pub(super) fn set_guest(&mut self, index: u32, value: u64) {
        self.set(index, |page, at| &mut page.guest[at], value);
    }

    /// Sets what the host gets back to what it has now.
    pub(super) fn set_host(&mut self) {
        for index in [msr::EFER, msr::PAT] {
            // SAFETY: reads of registers that every CPU with long mode has.
            let value = unsafe { msr::read(index) };
            self.set(index, |page, at| &mut page.host[at], value);
        }
    }

    fn set(&mut self, index: u32, entry: impl Fn(&mut Page, usize) -> &mut Entry, value: u64) {
        let Some(at) = self.indices[..self.len as usize].iter().position(|&it| it == index) else { return };
        let Some((_, mut page)) = self.page else { return };
        // SAFETY: the page is ours, valid for any bits, and the processor reads it only at entries and exits.
        *entry(unsafe { page.as_mut() }, at) = Entry { index, reserved: 0, value };
    }
}

impl Drop for MsrAreas {
    fn drop(&mut self) {
        if let Some((frame, _)) = self.page {
            mm::free(frame, FrameSize::Size4K);
        }
    }
}
