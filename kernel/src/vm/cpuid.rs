//! What a guest's CPUID says: a table computed once from the host's leaves and the VM's shape, and the lookup that a
//! CPUID exit makes, which adds what depends on the vCPU and its registers.
//!
//! A guest sees a CPU of the host's vendor, family and caches, with the features that Umbra supports and knows (see
//! `policy`), a local APIC with x2APIC and TSC deadline in any case, one socket of single-threaded cores whose APIC
//! IDs are their indices, and hypervisor leaves:
//!
//! - 4000_0000h: EAX = 4000_0001h, EBX, ECX, EDX = "UmbraUmbraUm".
//! - 4000_0001h: EAX bit 0: the exit counter MSR 4000_0100h exists.
//! - 4000_0100h, 4000_0101h: KVM's signature and, of its features, the clock alone (see `vm::pvclock`).
//!
//! Intel SDM vol. 2A, "CPUID"; AMD APM vol. 3, appendix E.
mod policy;
pub mod xsave;

/// CR4.LA57.
const CR4_LA57: u64 = 1 << 12;
/// CR4.OSXSAVE, mirrored in leaf 1.
const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.PKE, mirrored in leaf 7.
const CR4_PKE: u64 = 1 << 22;

/// First leaf of the extended range.
pub const EXTENDED: u32 = 0x8000_0000;
/// First leaf of the range that hypervisors define.
pub const HYPERVISOR: u32 = 0x4000_0000;
/// What leaf 4000_0000h says in EBX, ECX and EDX.
pub const SIGNATURE: [u8; 12] = *b"UmbraUmbraUm";

/// The four registers of a CPUID result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl CpuidLeaf {
    /// All four registers zero: an absent leaf.
    pub const ZERO: Self = Self::new(0, 0, 0, 0);

    /// A result by its registers.
    pub const fn new(eax: u32, ebx: u32, ecx: u32, edx: u32) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

/// The CPUID instruction of the machine that Umbra runs on.
pub trait HostCpuid {
    /// Executes CPUID.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidLeaf;
}

/// Whose manual a CPU follows where the two differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and those who build VMX.
    Intel,
    /// AMD, and those who build SVM.
    Amd,
}

impl Vendor {
    /// The vendor that leaf 0 names.
    fn of(leaf0: CpuidLeaf) -> Self {
        match [leaf0.ebx, leaf0.edx, leaf0.ecx].map(u32::to_le_bytes).as_flattened() {
            b"GenuineIntel" | b"CentaurHauls" | b"  Shanghai  " => Self::Intel,
            _ => Self::Amd,
        }
    }
}

/// What the table must know of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmShape {
    /// Number of vCPUs, 1 to 64. APIC IDs are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// The physical-address width that second-level tables can map; the guest sees at most the host's.
    pub max_phys_bits: u8,
    /// The guest's TSC frequency in Hz.
    pub tsc_hz: u64,
    /// XSAVEC and XSAVES, where the CPU has them, do what the manuals say.
    pub sound_compaction: bool,
}

/// What a CPUID result depends on at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// The vCPU's APIC ID.
    pub apic_id: u8,
    /// IA32_APIC_BASE.EN.
    pub apic_enabled: bool,
    /// The guest's CR4.
    pub cr4: u64,
    /// The guest's XCR0.
    pub xcr0: u64,
    /// It executes 64-bit code.
    pub long64: bool,
}

/// What the guest's CPU can do, as far as registers must be checked against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCaps {
    /// Whose manual applies.
    pub vendor: Vendor,
    /// Physical-address width.
    pub phys_bits: u8,
    /// Bits of EFER that exist, LMA among them.
    pub efer: u64,
    /// Bits of CR4 that exist.
    pub cr4: u64,
    /// Bits of XCR0 that exist; 0 without XSAVE.
    pub xcr0: u64,
    /// IA32_TSC_AUX exists.
    pub tsc_aux: bool,
    /// IA32_XSS exists, with no bit that may be set.
    pub xsaves: bool,
    /// INVPCID exists.
    pub invpcid: bool,
    /// LFENCE waits for all earlier instructions: what DE_CFG bit 1 tells a guest on AMD. Follows from CPUID
    /// 8000_0021h; a host that sets DE_CFG bit 1 itself may set it as well.
    pub lfence_serializing: bool,
}

impl GuestCaps {
    /// Width of linear addresses: 57 bits where CR4.LA57 exists, whether it is set or not.
    pub const fn linear_bits(&self) -> u8 {
        if self.cr4 & CR4_LA57 != 0 {
            57
        } else {
            48
        }
    }

    /// Whether XSETBV of XCR0 takes `value` (SDM vol. 1, 13.3).
    pub const fn xcr0_is_valid(&self, value: u64) -> bool {
        value & !self.xcr0 == 0 && xsave::is_consistent(value)
    }
}

/// How the entries of a leaf are chosen and completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    /// One entry whatever the subleaf.
    #[default]
    Plain,
    /// One entry for each subleaf, then zeros.
    Indexed,
    /// Leaf 1.
    Features,
    /// Leaf 7, indexed.
    StructuredFeatures,
    /// Leaf 0Dh, indexed.
    Xsave,
    /// Leaves 0Bh and 1Fh, indexed; EDX is the x2APIC ID of any subleaf.
    Topology,
    /// Leaf 8000_0001h.
    ExtendedFeatures,
    /// Leaf 8000_001Eh.
    AmdTopology,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    first: u8,
    count: u8,
    kind: Kind,
}

const BASIC_SLOTS: usize = 0x20;
const EXTENDED_SLOTS: usize = 0x22;
/// Two leaves of Umbra's own and two of the paravirtual clock.
const HYPERVISOR_SLOTS: usize = 4;
const ENTRIES: usize = 72;

/// The table of one VM, shared by its vCPUs.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    basic: [Slot; BASIC_SLOTS],
    extended: [Slot; EXTENDED_SLOTS],
    hypervisor: [Slot; HYPERVISOR_SLOTS],
    /// Entry 0 is all zeros, where unset slots point.
    entries: [CpuidLeaf; ENTRIES],
    len: u8,
    max_basic: u32,
    max_extended: u32,
    compacted_xsave: bool,
    caps: GuestCaps,
}

impl CpuidTable {
    /// Computes the table of a VM. Executes CPUID a few dozen times.
    pub fn new(host: &impl HostCpuid, shape: &VmShape) -> Self {
        policy::build(host, shape)
    }

    /// What follows from the table for control registers and MSRs.
    pub const fn caps(&self) -> &GuestCaps {
        &self.caps
    }

    /// The result of a guest's CPUID.
    #[inline(always)]
    pub fn lookup(&self, leaf: u32, subleaf: u32, cpu: &CpuState) -> CpuidLeaf {
        let slot = self.slot(leaf);
        match slot.kind {
            Kind::Plain => self.entry(slot, 0),
            Kind::Features => {
                let mut regs = self.entry(slot, 0);
                regs.ebx |= u32::from(cpu.apic_id) << 24;
                if cpu.cr4 & CR4_OSXSAVE != 0 {
                    regs.ecx |= policy::OSXSAVE;
                }
                if !cpu.apic_enabled {
                    regs.edx &= !policy::APIC;
                }
                regs
            }
            _ => self.lookup_rare(slot, subleaf, cpu),
        }
    }

    fn lookup_rare(&self, slot: Slot, subleaf: u32, cpu: &CpuState) -> CpuidLeaf {
        let mut regs =
            if subleaf < u32::from(slot.count) { self.entry(slot, subleaf as u8) } else { CpuidLeaf::ZERO };
        match slot.kind {
            Kind::StructuredFeatures if subleaf == 0 && cpu.cr4 & CR4_PKE != 0 => regs.ecx |= policy::OSPKE,
            Kind::Xsave => match subleaf {
                0 => regs.ebx = self.components(slot).standard_size(cpu.xcr0 & self.caps.xcr0),
                1 if self.compacted_xsave => {
                    regs.ebx = self.components(slot).compacted_size(cpu.xcr0 & self.caps.xcr0);
                }
                _ => {}
            },
            Kind::Topology => {
                regs.ecx |= subleaf & 0xff;
                regs.edx = cpu.apic_id.into();
            }
            Kind::ExtendedFeatures => {
                regs = self.entry(slot, 0);
                match self.caps.vendor {
                    // Intel's CPUs have the instruction in 64-bit mode alone, and say so.
                    Vendor::Intel if !cpu.long64 => regs.edx &= !policy::SYSCALL,
                    Vendor::Amd if !cpu.apic_enabled => regs.edx &= !policy::APIC,
                    _ => {}
                }
            }
            Kind::AmdTopology => {
                regs = CpuidLeaf::new(cpu.apic_id.into(), cpu.apic_id.into(), 0, 0);
            }
            _ => {}
        }
        regs
    }

    /// Where a leaf is. Out of range, Intel's CPUs answer as the highest basic leaf, AMD's with zeros; the range
    /// of hypervisors is empty on both.
    #[inline]
    fn slot(&self, leaf: u32) -> Slot {
        if leaf <= self.max_basic {
            return self.basic[leaf as usize & (BASIC_SLOTS - 1)];
        }
        if (EXTENDED..=self.max_extended).contains(&leaf) {
            return self.extended.get((leaf - EXTENDED) as usize).copied().unwrap_or_default();
        }
        if leaf >> 28 == HYPERVISOR >> 28 {
            // The ranges lie 100h apart: Umbra's own, then that of the paravirtual clock.
            let index = match leaf - HYPERVISOR {
                index @ 0..=1 => index as usize,
                index @ 0x100..=0x101 => index as usize - 0x100 + 2,
                _ => return Slot::default(),
            };
            return self.hypervisor[index & (HYPERVISOR_SLOTS - 1)];
        }
        match self.caps.vendor {
            Vendor::Intel => self.basic[self.max_basic as usize & (BASIC_SLOTS - 1)],
            Vendor::Amd => Slot::default(),
        }
    }

    #[inline]
    fn entry(&self, slot: Slot, index: u8) -> CpuidLeaf {
        self.entries.get(usize::from(slot.first) + usize::from(index)).copied().unwrap_or_default()
    }

    fn components(&self, slot: Slot) -> xsave::Components<'_> {
        let first = usize::from(slot.first);
        xsave::Components(self.entries.get(first..first + usize::from(slot.count)).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests;
