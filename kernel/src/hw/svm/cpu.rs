//! SVM on one physical CPU: detection, enabling, host state, ASIDs.
#![allow(unsafe_code)] // MSR writes that turn the extension on, and the per-CPU cells.

use super::capabilities::{self, vm_cr, VmCr};
use super::permission_map::{allow_msr, IOPM_BYTES, MSRPM_BYTES};
use super::vcpu::SvmVcpu;
use crate::cpu::features::{self, Features};
use crate::cpu::msr;
use crate::hw::cr4;
use crate::hw::shadowed::ShadowFormat;
use crate::hw::tag::{Allocation, TagAllocator};
use crate::hw::{Capabilities, OutOfMemory, Refusal, Translation, Vendor};
use crate::mm::{self, FrameSize, Zone};
use crate::vm::msr::passthrough;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::fmt;
use mmu::{Npt, NptHost, PageSize};
use spin::Once;
use x86_64::registers::model_specific::{Efer, EferFlags, Msr};
use x86_64::PhysAddr;

/// VM_CR. APM 15.30.1.
const MSR_VM_CR: u32 = 0xc001_0114;
/// VM_HSAVE_PA. APM 15.30.4.
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;

/// Most processors that one machine may have.
pub(super) const MAX_CPUS: usize = mmu::MAX_CPUS;

/// SVM as this machine has it.
#[derive(Clone, Copy, Debug)]
pub struct Svm {
    /// Nested paging.
    npt: bool,
    /// Next RIP at exits.
    pub(super) nrips: bool,
    /// Single-ASID flushes.
    pub(super) flush_by_asid: bool,
    /// PAUSE filter with count and threshold.
    pub(super) pause_filter: bool,
    /// Permission map for ports, all ones: every port exits.
    pub(super) iopm: PhysAddr,
    /// Permission map for MSRs.
    pub(super) msrpm: PhysAddr,
    /// The guest may have INVPCID.
    pub(super) invpcid: bool,
    /// A guest may have five levels.
    la57: bool,
    asid_count: u32,
    /// All that CPUID tells.
    offered: features::Svm,
    host: NptHost,
    cr4_bits: u64,
}

impl fmt::Display for Svm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |has: bool| if has { "yes" } else { "no" };
        write!(
            f,
            "{} ASIDs, next RIP {}, flush by ASID {}, PAUSE filter {}",
            self.asid_count,
            yes(self.nrips),
            yes(self.flush_by_asid),
            yes(self.pause_filter)
        )
    }
}

/// What one CPU keeps for running guests.
pub(super) struct SvmCpu {
    /// Page that VMSAVE filled with the host's FS, GS, TR, LDTR and system-call MSRs; zero while SVM is off.
    pub(super) host_state: PhysAddr,
    /// Tags of this CPU's TLB.
    pub(super) asids: TagAllocator,
    /// Names this CPU and the generation of its tags, as no other CPU and no other generation: one who knows it has a tag
    /// that is good here. Zero, which nobody knows, before the first.
    pub(super) epoch: u64,
}

impl SvmCpu {
    /// A CPU that no guest can run on.
    const OFF: Self = Self { host_state: PhysAddr::zero(), asids: TagAllocator::new(2), epoch: 0 };

    /// Gives a tag, as [`TagAllocator::allocate`] does, on this CPU, whose index is `cpu`.
    #[inline]
    pub(super) fn allocate(&mut self, cpu: usize) -> Allocation {
        let allocation = self.asids.allocate();
        if allocation.flush_all {
            self.epoch = allocation.tag.generation * MAX_CPUS as u64 + cpu as u64;
        }
        allocation
    }
}

struct CpuCell(UnsafeCell<SvmCpu>);
// SAFETY: cell n is touched by CPU n alone, with interrupts off (see `with_this_cpu`).
unsafe impl Sync for CpuCell {}

static CPUS: [CpuCell; MAX_CPUS] = [const { CpuCell(UnsafeCell::new(SvmCpu::OFF)) }; MAX_CPUS];

/// Runs `f` on this CPU's state. None if there are not so many CPUs.
///
/// # Safety
/// `index` is that of the CPU that calls, and interrupts are off.
#[inline]
pub(super) unsafe fn with_this_cpu<R>(index: usize, f: impl FnOnce(&mut SvmCpu) -> R) -> Option<R> {
    // SAFETY: the caller's promise; `f` cannot reach this function again (it sees only the `SvmCpu`), so no second
    // reference exists.
    Some(f(unsafe { &mut *CPUS.get(index)?.0.get() }))
}

/// Builds the maps that all guests share: every port exits, every MSR but the switched ones exits.
fn permission_maps(supervisor_keys: bool) -> (PhysAddr, PhysAddr) {
    let allocate = |bytes: usize| {
        let frames = mm::alloc_contiguous(bytes as u64).expect("memory for permission maps at boot");
        // SAFETY: the frames are ours alone, contiguous, and `bytes` long.
        let map = unsafe { core::slice::from_raw_parts_mut(mm::phys_to_virt(frames), bytes) };
        map.fill(0xff);
        (frames, map)
    };
    let (iopm, _) = allocate(IOPM_BYTES);
    let (msrpm, map) = allocate(MSRPM_BYTES);
    let map: &mut [u8; MSRPM_BYTES] = map.try_into().expect("a slice of that length");
    for msr in passthrough(supervisor_keys) {
        allow_msr(map, msr, true, true);
    }
    (iopm, msrpm)
}

/// What this CPU's VM_CR allows.
fn read_vm_cr() -> VmCr {
    // SAFETY: VM_CR exists on every CPU with SVM; reading it has no effect.
    vm_cr(unsafe { Msr::new(MSR_VM_CR).read() })
}

impl Vendor for Svm {
    type Vcpu = SvmVcpu;
    type Format = Npt;

    fn detect(features: &Features) -> Result<Self, Refusal> {
        let Some(svm) = &features.svm else {
            return Err(Refusal::NoVirtualization);
        };
        if read_vm_cr() == VmCr::LockedOff {
            return Err(Refusal::SvmDisabledByFirmware);
        }
        let cr4_bits = cr4::of_this_cpu();
        static MAPS: Once<(PhysAddr, PhysAddr)> = Once::new();
        let &(iopm, msrpm) = MAPS.call_once(|| permission_maps(cr4_bits & cr4::PKS != 0));
        Ok(Self {
            npt: svm.npt,
            nrips: svm.nrips,
            flush_by_asid: svm.flush_by_asid,
            pause_filter: svm.pause_filter && svm.pause_filter_threshold,
            iopm,
            msrpm,
            invpcid: features.invpcid,
            la57: features.la57,
            asid_count: svm.asids.max(2),
            offered: *svm,
            cr4_bits,
            host: NptHost {
                // Umbra's own tables have four levels, and the depth of nested tables is that of the host's.
                five_level: false,
                max_phys_addr: features.physical_address_bits,
                no_execute: features.nx,
                largest: if features.pages_1g { PageSize::Size1G } else { PageSize::Size2M },
            },
        })
    }

    fn enable_on_this_cpu(&self) -> Result<(), Refusal> {
        if let VmCr::MustWrite(value) = read_vm_cr() {
            // SAFETY: clears SVMDIS, which is not locked, and changes nothing else.
            unsafe { msr::try_write(MSR_VM_CR, value) };
        }
        if read_vm_cr() != VmCr::Usable {
            return Err(Refusal::SvmDisabledByFirmware);
        }
        let page = || mm::alloc(FrameSize::Size4K, Zone::Any).expect("memory for host state at boot");
        let (host_save, host_state) = (page(), page());
        // SAFETY: the pages are ours and stay so. Setting SVME on a CPU with SVM changes nothing that runs; VMSAVE
        // stores into `host_state` only.
        unsafe {
            mm::phys::zero(host_save, 4096);
            mm::phys::zero(host_state, 4096);
            Efer::update(|efer| efer.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE));
            Msr::new(MSR_VM_HSAVE_PA).write(host_save.as_u64());
            asm!("vmsave rax", in("rax") host_state.as_u64(), options(nostack, preserves_flags));
        }
        let index = crate::cpu::number();
        let state = SvmCpu { host_state, asids: TagAllocator::new(self.asid_count), epoch: 0 };
        if let Some(cell) = CPUS.get(index) {
            // SAFETY: as in `with_this_cpu`; this CPU runs no guest yet.
            unsafe { *cell.0.get() = state };
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        if self.npt {
            "SVM with nested paging"
        } else {
            "SVM without nested paging"
        }
    }

    fn capabilities(&self) -> Capabilities {
        capabilities::list(&self.offered)
    }

    fn tlb_tags(&self) -> u32 {
        self.asid_count
    }

    fn two_stages(&self) -> Result<(), Refusal> {
        if self.npt {
            Ok(())
        } else {
            Err(Refusal::NoNestedPaging)
        }
    }

    fn format(&self) -> Npt {
        Npt::new(&self.host)
    }

    fn shadow_format(&self) -> ShadowFormat {
        ShadowFormat::new(&NptHost { five_level: self.la57, ..self.host })
    }

    fn new_vcpu(&self, translation: Translation, cr4: u64) -> Result<SvmVcpu, OutOfMemory> {
        let mut vcpu = SvmVcpu::new(*self, translation)?;
        if self.cr4_bits & !cr4 != 0 {
            vcpu.intercept_cr4_writes();
        }
        Ok(vcpu)
    }
}
