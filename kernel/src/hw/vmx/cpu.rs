//! VMX on one physical CPU: detection, enabling, TLB tags.
#![allow(unsafe_code)] // MSR writes and VMXON, and the per-CPU cells.

use super::capabilities::{
    feature_control, has_faulty_preemption_timer, EptVpid, FeatureControl, VmxCapabilities,
    MSR_FEATURE_CONTROL, MSR_VMX_BASIC,
};
use super::choice::{examine, Controls, Mode, Unsuitable};
use super::controls::{Primary, Secondary};
use super::instructions::vmxon;
use super::vcpu::VmxVcpu;
use super::{listing, msr_bitmap};
use crate::cpu::features::Features;
use crate::cpu::{self, compaction, msr};
use crate::hw::cr4;
use crate::hw::shadowed::ShadowFormat;
use crate::hw::tag::TagAllocator;
use crate::hw::{Capabilities, GuestPage, OutOfMemory, Refusal, Translation, Vendor};
use crate::mm::{self, FrameSize, Zone};
use core::cell::UnsafeCell;
use core::fmt;
use mmu::{Ept, EptHost, Hpa, NptHost, PageSize};
use spin::Once;
use x86_64::registers::control::{Cr0, Cr4};
use x86_64::PhysAddr;

/// CR4.VMXE.
const CR4_VMXE: u64 = 1 << 13;
/// CR4.SMXE: SMX operation may be possible; Umbra never enters it.
const IN_SMX: bool = false;
/// VPIDs have 16 bits; zero is the host's.
const VPID_COUNT: u32 = 1 << 16;

/// VMX as this machine has it.
#[derive(Clone, Copy, Debug)]
pub struct Vmx {
    shared: &'static Machine,
}

/// What all CPUs share.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) capabilities: VmxCapabilities,
    /// The controls of a new vCPU whose addresses are translated in two stages, if the CPU can.
    pub(super) two_stages: Result<Controls, Unsuitable>,
    /// Those of one whose addresses are translated by shadow tables.
    pub(super) shadow: Controls,
    /// Bitmaps for MSRs.
    pub(super) msr_bitmap: PhysAddr,
    /// The same while the processor has the local APIC.
    pub(super) apic_msr_bitmap: PhysAddr,
    /// Bitmaps for ports, all ones: every port exits. For CPUs where nothing else makes them exit.
    pub(super) io_bitmaps: PhysAddr,
    /// Umbra's own CR4.
    pub(super) host_cr4: u64,
    /// Whether the VMX-preemption timer, if there is one, counts as it should.
    pub(super) timer_is_reliable: bool,
    /// Whether EPT keeps accessed and dirty flags.
    accessed_dirty: bool,
    format: Ept,
    /// What the CPU's own tables can be.
    shadow_host: NptHost,
}

impl Machine {
    /// The controls of a vCPU whose addresses are translated so.
    fn controls(&self, translation: Translation) -> &Controls {
        match (translation, &self.two_stages) {
            (Translation::TwoStages(_), Ok(controls)) => controls,
            _ => &self.shadow,
        }
    }

    /// Whether the processor can log pages that become dirty. It takes EPT's dirty flags for that (SDM vol. 3, 29.3.6).
    pub(super) fn can_log_dirty_pages(&self, controls: &Controls) -> bool {
        controls.offered.contains(Secondary::PAGE_MODIFICATION_LOG)
            && self.accessed_dirty
            && !controls.shadow()
    }
}

impl fmt::Display for Vmx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { capabilities, two_stages, shadow, .. } = self.shared;
        let controls = two_stages.as_ref().unwrap_or(shadow);
        let yes = |has: bool| if has { "yes" } else { "no" };
        let ept = capabilities.ept_vpid;
        write!(
            f,
            "unrestricted guest {}, VPID {}, EPT accessed and dirty {}, execute-only {}, 1G pages {}, TPR shadow {}, \
             preemption timer {}, APIC virtualization {}, page-modification log {}, mode-based execute {}",
            yes(controls.unrestricted()),
            yes(controls.secondary.contains(Secondary::VPID)),
            yes(ept.contains(EptVpid::ACCESSED_DIRTY)),
            yes(ept.contains(EptVpid::EXECUTE_ONLY)),
            yes(ept.contains(EptVpid::PAGES_1G)),
            yes(controls.primary.contains(Primary::TPR_SHADOW)),
            yes(controls.preemption_timer),
            yes(controls.can_virtualize_apic()),
            yes(self.shared.can_log_dirty_pages(controls)),
            yes(controls.secondary.contains(Secondary::MODE_BASED_EXECUTE)),
        )
    }
}

/// What one CPU keeps for running guests.
pub(super) struct VmxCpu {
    /// Tags of this CPU's TLB.
    pub(super) vpids: TagAllocator,
}

struct CpuCell(UnsafeCell<Option<VmxCpu>>);
// SAFETY: cell n is touched by CPU n alone, with interrupts off (see `with_this_cpu`).
unsafe impl Sync for CpuCell {}

static CPUS: [CpuCell; mmu::MAX_CPUS] = [const { CpuCell(UnsafeCell::new(None)) }; mmu::MAX_CPUS];

/// Runs `f` on this CPU's state. None if VMX was not enabled here.
///
/// # Safety
/// `index` is that of the CPU that calls, and interrupts are off.
#[inline]
pub(super) unsafe fn with_this_cpu<R>(index: usize, f: impl FnOnce(&mut VmxCpu) -> R) -> Option<R> {
    // SAFETY: the caller's promise; `f` cannot reach this function again (it sees only the `VmxCpu`), so no second
    // reference exists.
    unsafe { (*CPUS.get(index)?.0.get()).as_mut().map(f) }
}

impl Vmx {
    pub(super) fn machine(&self) -> &'static Machine {
        self.shared
    }
}

/// Two pages of ones.
fn io_bitmaps() -> PhysAddr {
    let frames = mm::alloc_contiguous(2 * 4096).expect("memory for the I/O bitmaps at boot");
    // SAFETY: new frames, which nothing else knows.
    unsafe {
        mm::phys::write(frames, &[0xff; 4096]);
        mm::phys::write(frames + 4096, &[0xff; 4096]);
    }
    frames
}

/// What [`Unsuitable`] is to the owner of the machine.
fn refusal(unsuitable: Unsuitable) -> Refusal {
    match unsuitable {
        Unsuitable::NoEpt => Refusal::NoExtendedPageTables,
        other => {
            static WHY: Once<alloc::string::String> = Once::new();
            Refusal::Unsuitable(WHY.call_once(|| alloc::format!("{other}")))
        }
    }
}

impl Vendor for Vmx {
    type Vcpu = VmxVcpu;
    type Format = Ept;

    fn detect(features: &Features) -> Result<Self, Refusal> {
        if !features.vmx {
            return Err(Refusal::NoVirtualization);
        }
        // SAFETY: the MSR exists on every CPU with VMX; reading it has no effect.
        let control = unsafe { msr::try_read(MSR_FEATURE_CONTROL) }.unwrap_or(0);
        if feature_control(control, IN_SMX) == FeatureControl::LockedOff {
            return Err(Refusal::VmxDisabledByFirmware);
        }
        // SAFETY: capability MSRs, of which only those are read that exist.
        let read = |index| unsafe { msr::read(index) };
        let linear_bits = if features.la57 { 57 } else { 48 };
        let capabilities = VmxCapabilities::read(read, features.physical_address_bits, linear_bits);
        let sound = |mut controls: Controls| {
            if !compaction::is_sound() {
                // Hidden from guests: #UD, as without it.
                controls.secondary -= Secondary::XSAVES;
            }
            controls
        };
        let two_stages = examine(&capabilities, Mode::Unrestricted).map(sound);
        let shadow = examine(&capabilities, Mode::Shadow).map(sound).map_err(refusal)?;
        let has = |control| two_stages.as_ref().is_ok_and(|controls| controls.secondary.contains(control));
        let signature = core::arch::x86_64::__cpuid(1).eax;
        let ept = capabilities.ept_vpid;
        // Without unrestricted guest the processor walks identity tables that the guest must not change. With these flags
        // its walks would be writes (29.3.3.2).
        let accessed_dirty = ept.contains(EptVpid::ACCESSED_DIRTY) && has(Secondary::UNRESTRICTED_GUEST);
        let format = Ept::new(&EptHost {
            five_level: false,
            max_phys_addr: features.physical_address_bits,
            largest: if ept.contains(EptVpid::PAGES_1G) {
                PageSize::Size1G
            } else if ept.contains(EptVpid::PAGES_2M) {
                PageSize::Size2M
            } else {
                PageSize::Size4K
            },
            accessed_dirty,
            execute_only: ept.contains(EptVpid::EXECUTE_ONLY),
            mode_based_execute: has(Secondary::MODE_BASED_EXECUTE),
        });
        let supervisor_keys = cr4::of_this_cpu() & cr4::PKS != 0;
        static MACHINE: Once<Machine> = Once::new();
        let shared = MACHINE.call_once(|| Machine {
            capabilities,
            two_stages,
            shadow,
            msr_bitmap: msr_bitmap::for_all_guests(false, supervisor_keys),
            apic_msr_bitmap: msr_bitmap::for_all_guests(true, supervisor_keys),
            io_bitmaps: io_bitmaps(),
            host_cr4: Cr4::read_raw(),
            timer_is_reliable: !has_faulty_preemption_timer(signature),
            accessed_dirty,
            format,
            shadow_host: NptHost {
                five_level: features.la57,
                max_phys_addr: features.physical_address_bits,
                no_execute: features.nx,
                largest: if features.pages_1g { PageSize::Size1G } else { PageSize::Size2M },
            },
        });
        Ok(Self { shared })
    }

    fn enable_on_this_cpu(&self) -> Result<(), Refusal> {
        let capabilities = &self.shared.capabilities;
        // SAFETY: the MSR exists (see `detect`); it is written only if it is not locked, with the bits that VMXON needs.
        let usable = unsafe {
            match feature_control(msr::try_read(MSR_FEATURE_CONTROL).unwrap_or(0), IN_SMX) {
                FeatureControl::Usable => true,
                FeatureControl::MustLock(value) => msr::try_write(MSR_FEATURE_CONTROL, value),
                FeatureControl::LockedOff => false,
            }
        };
        if !usable {
            return Err(Refusal::VmxDisabledByFirmware);
        }
        // SAFETY: reading the MSR has no effect.
        if unsafe { msr::read(MSR_VMX_BASIC) } != capabilities.basic {
            return Err(Refusal::NotEnabled("VMX, for it is not that of the boot CPU"));
        }
        let region = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any)
            .ok_or(Refusal::NotEnabled("VMX, for there is no memory left"))?;
        // SAFETY: the frame is ours and stays the processor's. Setting VMXE on a CPU with VMX changes nothing that runs,
        // and the fixed bits of CR0 and CR4 are checked before anything is written.
        unsafe {
            mm::phys::write(region, &capabilities.revision().to_le_bytes());
            let (cr0, cr4) = (Cr0::read_raw(), Cr4::read_raw() | CR4_VMXE);
            let fits = |value: u64, must: u64, may: u64| must & !value == 0 && value & !may == 0;
            if !fits(cr0, capabilities.cr0_fixed0, capabilities.cr0_fixed1)
                || !fits(cr4, capabilities.cr4_fixed0, capabilities.cr4_fixed1)
            {
                return Err(Refusal::NotEnabled(
                    "VMX, for it fixes bits of CR0 or CR4 that Umbra has otherwise",
                ));
            }
            Cr4::write_raw(cr4);
            vmxon(region).map_err(|_| Refusal::NotEnabled("VMX"))?;
        }
        if let Some(cell) = CPUS.get(cpu::number()) {
            // SAFETY: as in `with_this_cpu`; this CPU runs no guest yet.
            unsafe { *cell.0.get() = Some(VmxCpu { vpids: TagAllocator::new(VPID_COUNT) }) };
        }
        Ok(())
    }

    fn format(&self) -> Ept {
        self.shared.format
    }

    fn shadow_format(&self) -> ShadowFormat {
        ShadowFormat::new(&self.shared.shadow_host)
    }

    fn name(&self) -> &'static str {
        if self.shared.two_stages.is_ok() {
            "VMX with EPT"
        } else {
            "VMX without EPT"
        }
    }

    fn capabilities(&self) -> Capabilities {
        let Machine { capabilities, two_stages, shadow, accessed_dirty, .. } = self.shared;
        listing::list(capabilities, two_stages.as_ref().unwrap_or(shadow), *accessed_dirty)
    }

    fn tlb_tags(&self) -> u32 {
        let controls = self.shared.two_stages.as_ref().unwrap_or(&self.shared.shadow);
        if controls.secondary.contains(Secondary::VPID) {
            VPID_COUNT
        } else {
            1
        }
    }

    fn two_stages(&self) -> Result<(), Refusal> {
        self.shared.two_stages.map(|_| ()).map_err(refusal)
    }

    fn guest_pages(&self, shadow: bool) -> &'static [GuestPage] {
        let unrestricted = self.shared.two_stages.as_ref().is_ok_and(Controls::unrestricted);
        if unrestricted && !shadow {
            &[]
        } else {
            super::real_mode::GUEST_PAGES
        }
    }

    fn new_vcpu(&self, translation: Translation, cr4: u64) -> Result<VmxVcpu, OutOfMemory> {
        VmxVcpu::new(*self, self.shared.controls(translation), translation, cr4)
    }
}

impl Vmx {
    /// The EPT pointer for tables with this root.
    pub(super) fn eptp(&self, root: u64) -> u64 {
        self.shared.format.pointer(Hpa::new_truncate(root))
    }
}
