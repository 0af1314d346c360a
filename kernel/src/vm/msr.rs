//! Which MSRs a guest has and what its RDMSR and WRMSR do.
//!
//! An MSR is one of three things: passed through ([`PASSTHROUGH`], held by the VMCB or VMCS and open in the
//! permission map, so it never comes here), emulated here, or absent, which is #GP. What a write must change
//! elsewhere comes back as a [`MsrEffect`].
//!
//! Memory types: PAT goes to the VMCB and counts. MTRRs can be written and read back under the architecture's
//! checks, but are not enforced: under nested paging the types come from the second-level entries and the guest's
//! PAT. They start enabled with write-back as default (as firmware would leave them), so that kernels trust them
//! and PAT.
//!
//! What Intel's kernels read without being promised it, and why it is as it is here:
//!
//! - MISC_ENABLE: bits 22 (limit CPUID to leaf 2) and 34 (no NX), 16 (EIST) and 18 (MONITOR) are clear, as CPUID says,
//!   and stay so; kernels look at the first two and would clear them. Only fast strings can be switched.
//! - PLATFORM_ID is 0, BIOS_SIGN_ID a constant whatever was written before: there is no microcode to update.
//! - FEATURE_CONTROL is locked with VMX, SMX and SGX off, as firmware leaves it where it offers none of them.
//! - PLATFORM_INFO (CEh), MISC_FEATURES_ENABLES (140h), PPIN, the ratios, RAPL's and the uncore's are absent. No CPUID
//!   bit stands for them, their layout depends on the model, and kernels read them with a fault handler.
//! - ARCH_CAPABILITIES, CORE_CAPABILITIES, SPEC_CTRL, PRED_CMD, FLUSH_CMD, MCU_OPT_CTRL, TSX_CTRL, PERF_CAPABILITIES,
//!   ENERGY_PERF_BIAS, MPERF, APERF, HWP's and the thermal ones are absent because their CPUID bits are clear.
//! - The last-branch registers of the P6 family (1DBh to 1DEh) are AMD's alone.
//!
//! Intel SDM vol. 4; AMD APM vol. 2, appendix A, and AMD's processor programming references for C001_xxxx.
use crate::devices::lapic::{ApicAction, LocalApic, X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
use crate::vm::cpuid::{GuestCaps, Vendor};

pub use crate::devices::lapic::Gp;
pub use mtrr::Mtrrs;

mod mtrr;

// ---- Registers ----

/// MSR numbers, by the names of the manuals.
#[allow(missing_docs)]
pub mod index {
    pub const P5_MC_ADDR: u32 = 0x00;
    pub const P5_MC_TYPE: u32 = 0x01;
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    /// BIOS_SIGN_ID of Intel, PATCH_LEVEL of AMD.
    pub const MICROCODE_REVISION: u32 = 0x8b;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM_IP: u32 = 0x1db;
    pub const LAST_EXCEPTION_TO_IP: u32 = 0x1de;
    pub const MTRR_PHYS_FIRST: u32 = 0x200;
    pub const MTRR_PHYS_LAST: u32 = 0x20f;
    pub const MTRR_FIX_64K: u32 = 0x250;
    pub const MTRR_FIX_16K_FIRST: u32 = 0x258;
    pub const MTRR_FIX_16K_LAST: u32 = 0x259;
    pub const MTRR_FIX_4K_FIRST: u32 = 0x268;
    pub const MTRR_FIX_4K_LAST: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const PKRS: u32 = 0x6e1;
    pub const XSS: u32 = 0xda0;
    /// Umbra's own: exits taken by this vCPU since its reset, the one for this read included. Read-only.
    pub const EXIT_COUNT: u32 = 0x4000_0100;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const SYSCFG: u32 = 0xc001_0010;
    pub const HWCR: u32 = 0xc001_0015;
    pub const IORR_FIRST: u32 = 0xc001_0016;
    pub const IORR_LAST: u32 = 0xc001_0019;
    pub const TOP_MEM: u32 = 0xc001_001a;
    pub const TOP_MEM2: u32 = 0xc001_001d;
    pub const NB_CFG: u32 = 0xc001_001f;
    pub const INT_PENDING: u32 = 0xc001_0055;
    pub const MMIO_CFG_BASE: u32 = 0xc001_0058;
    pub const VM_CR: u32 = 0xc001_0114;
    pub const DE_CFG: u32 = 0xc001_1029;
}
use index as msr;

/// The MSRs that a guest reads and writes without an exit, on SVM: VMRUN, VMLOAD and VMSAVE move them. VMX holds the
/// SYSENTER MSRs, FS_BASE and GS_BASE in the VMCS and needs its MSR areas for the others.
pub const PASSTHROUGH: [u32; 10] = [
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
];

/// MSRs that a guest also reads and writes without an exit, where its CPU has what they belong to (`supervisor_keys`:
/// protection keys of supervisor pages): a change of vCPUs switches them.
pub fn passthrough(supervisor_keys: bool) -> impl Iterator<Item = u32> {
    PASSTHROUGH.into_iter().chain(supervisor_keys.then_some(msr::PKRS))
}

/// PAT after reset (SDM table 12-12; APM table 7-9).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// EFER: long mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode is active. Read-only.
pub const EFER_LMA: u64 = 1 << 10;

/// MISC_ENABLE: fast strings; the only bit that a guest may change.
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;
/// MISC_ENABLE: neither branch trace store nor PEBS exists.
const MISC_ENABLE_RESET: u64 = MISC_ENABLE_FAST_STRINGS | 1 << 11 | 1 << 12;

/// HWCR: machine-check status registers may be written; kept, for kernels read it back.
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// HWCR: the TSC counts at the P0 rate. Always set.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// HWCR: SMM lock, TLB cache disable, flush filter disable, IGNNE emulation: accepted, without effect.
const HWCR_IGNORED: u64 = 1 << 0 | 1 << 3 | 1 << 6 | 1 << 8;

/// NB_CFG: extended configuration space through CF8h; kept, for kernels set it.
const NB_CFG_EXTENDED_CF8: u64 = 1 << 46;

/// VM_CR: SVM is off, and locked so (APM vol. 2, 15.30.1). Writes are ignored then.
const VM_CR_OFF_AND_LOCKED: u64 = 1 << 3 | 1 << 4;
const VM_CR_DEFINED: u64 = 0x1f;

/// DE_CFG: LFENCE waits for all earlier instructions.
const DE_CFG_LFENCE_SERIALIZING: u64 = 1 << 1;

/// Microcode revisions that a guest sees: some, so that nobody takes the CPU for unpatched silicon.
const MICROCODE_INTEL: u64 = 1 << 32;
const MICROCODE_AMD: u64 = 0x0100_0000;

/// FEATURE_CONTROL: locked, with VMX off.
const FEATURE_CONTROL_LOCKED: u64 = 1;

// ---- State ----

/// The emulated MSRs of one vCPU that have no other home. Plain data: saving it is copying it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrState {
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u32,
    /// Memory-type range registers.
    pub mtrrs: Mtrrs,
    /// IA32_MISC_ENABLE (Intel).
    pub misc_enable: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// HWCR (AMD), without the constant bits.
    pub hwcr: u64,
    /// NB_CFG (AMD).
    pub nb_cfg: u64,
    /// TOP_MEM (AMD): end of RAM below 4 GiB.
    pub top_mem: u64,
    /// TOP_MEM2 (AMD): end of RAM above 4 GiB, 0 without such RAM.
    pub top_mem2: u64,
}

/// What an access needs to know, and the local APIC, which has MSRs of its own.
#[derive(Debug)]
pub struct MsrContext<'a> {
    /// The guest's CPU.
    pub caps: &'a GuestCaps,
    /// The vCPU's local APIC.
    pub lapic: &'a mut LocalApic,
    /// Nanoseconds on the VM's clock.
    pub now_ns: u64,
    /// The guest's TSC.
    pub tsc: u64,
    /// The guest's EFER, which the CPU itself keeps (LMA follows CR0.PG without an exit).
    pub efer: u64,
    /// The guest's CR0.PG.
    pub paging: bool,
    /// Exits of this vCPU since its reset, this one included.
    pub exits: u64,
}

/// What the caller of a write must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Load EFER with this (the host's own bits aside).
    Efer(u64),
    /// Load the guest's PAT with this.
    Pat(u64),
    /// Add this to the TSC offset, modulo 2^64. A TSC deadline that is armed has moved in time.
    TscOffset(u64),
    /// Load TSC_AUX with this.
    TscAux(u32),
    /// The local APIC was enabled, disabled, moved or changed its mode: look at its `mmio_base` again.
    ApicBase,
    /// Carry this out.
    Apic(ApicAction),
}

impl MsrState {
    /// The state after power-up. `top_mem` and `top_mem2` are the ends of RAM below and above 4 GiB (0: none).
    /// INIT changes none of these registers (SDM table 10-1).
    pub const fn new(top_mem: u64, top_mem2: u64) -> Self {
        Self {
            tsc_adjust: 0,
            pat: PAT_RESET,
            tsc_aux: 0,
            mtrrs: Mtrrs::new(),
            misc_enable: MISC_ENABLE_RESET,
            mcg_status: 0,
            hwcr: 0,
            nb_cfg: 0,
            top_mem,
            top_mem2,
        }
    }

    /// Takes over a saved state; values that no WRMSR could have stored become those of reset.
    pub fn restore(&mut self, saved: &Self, caps: &GuestCaps) {
        *self = saved.clone();
        if !pat_is_valid(self.pat) {
            self.pat = PAT_RESET;
        }
        self.mtrrs.sanitize(caps.phys_bits);
        self.misc_enable =
            MISC_ENABLE_RESET & !MISC_ENABLE_FAST_STRINGS | self.misc_enable & MISC_ENABLE_FAST_STRINGS;
        self.mcg_status &= 7;
        self.hwcr &= HWCR_MC_STATUS_WRITE;
        self.nb_cfg &= NB_CFG_EXTENDED_CF8;
    }

    /// RDMSR.
    #[inline(always)]
    pub fn read(&self, msr: u32, cx: &mut MsrContext<'_>) -> Result<u64, Gp> {
        // The frequent ones first.
        match msr {
            msr::TSC_DEADLINE => Ok(cx.lapic.tsc_deadline(cx.now_ns, cx.tsc)),
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => cx.lapic.msr_read(msr, cx.now_ns, cx.tsc),
            msr::TSC_ADJUST => Ok(self.tsc_adjust),
            msr::TSC => Ok(cx.tsc),
            msr::EXIT_COUNT => Ok(cx.exits),
            msr::APIC_BASE => Ok(cx.lapic.base()),
            msr::EFER => Ok(cx.efer & cx.caps.efer),
            _ => self.read_rare(msr, cx.caps),
        }
    }

    /// WRMSR.
    #[inline(always)]
    pub fn write(&mut self, msr: u32, value: u64, cx: &mut MsrContext<'_>) -> Result<MsrEffect, Gp> {
        match msr {
            msr::TSC_DEADLINE => {
                cx.lapic.set_tsc_deadline(value, cx.now_ns, cx.tsc);
                Ok(MsrEffect::None)
            }
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => match cx.lapic.msr_write(msr, value, cx.now_ns, cx.tsc)? {
                ApicAction::None => Ok(MsrEffect::None),
                action => Ok(MsrEffect::Apic(action)),
            },
            msr::TSC_ADJUST => {
                let delta = value.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = value;
                Ok(MsrEffect::TscOffset(delta))
            }
            msr::TSC => {
                // TSC and TSC_ADJUST move together (SDM 18.17.3).
                let delta = value.wrapping_sub(cx.tsc);
                self.tsc_adjust = self.tsc_adjust.wrapping_add(delta);
                Ok(MsrEffect::TscOffset(delta))
            }
            msr::APIC_BASE => cx.lapic.set_base(value).map(|()| MsrEffect::ApicBase),
            msr::EFER => efer_after_write(value, cx.efer, cx.paging, cx.caps).map(MsrEffect::Efer),
            _ => self.write_rare(msr, value, cx.caps),
        }
    }

    #[inline(never)]
    fn read_rare(&self, msr: u32, caps: &GuestCaps) -> Result<u64, Gp> {
        match msr {
            msr::PAT => Ok(self.pat),
            msr::TSC_AUX if caps.tsc_aux => Ok(self.tsc_aux.into()),
            msr::XSS if caps.xsaves => Ok(0),
            msr::P5_MC_ADDR | msr::P5_MC_TYPE | msr::MCG_CAP | msr::DEBUGCTL => Ok(0),
            msr::MCG_STATUS => Ok(self.mcg_status),
            _ => match self.mtrrs.read(msr) {
                Some(value) => Ok(value),
                None if caps.vendor == Vendor::Intel => self.read_intel(msr),
                None => self.read_amd(msr, caps),
            },
        }
    }

    fn read_intel(&self, msr: u32) -> Result<u64, Gp> {
        match msr {
            msr::MISC_ENABLE => Ok(self.misc_enable),
            msr::PLATFORM_ID => Ok(0),
            msr::MICROCODE_REVISION => Ok(MICROCODE_INTEL),
            msr::FEATURE_CONTROL => Ok(FEATURE_CONTROL_LOCKED),
            _ => Err(Gp),
        }
    }

    fn read_amd(&self, msr: u32, caps: &GuestCaps) -> Result<u64, Gp> {
        match msr {
            msr::MICROCODE_REVISION => Ok(MICROCODE_AMD),
            msr::HWCR => Ok(self.hwcr | HWCR_TSC_FREQ_SEL),
            msr::NB_CFG => Ok(self.nb_cfg),
            msr::TOP_MEM => Ok(self.top_mem),
            msr::TOP_MEM2 => Ok(self.top_mem2),
            msr::VM_CR => Ok(VM_CR_OFF_AND_LOCKED),
            msr::DE_CFG if caps.lfence_serializing => Ok(DE_CFG_LFENCE_SERIALIZING),
            msr::DE_CFG
            | msr::SYSCFG
            | msr::LAST_BRANCH_FROM_IP..=msr::LAST_EXCEPTION_TO_IP
            | msr::IORR_FIRST..=msr::IORR_LAST
            | msr::INT_PENDING
            | msr::MMIO_CFG_BASE => Ok(0),
            _ => Err(Gp),
        }
    }

    #[inline(never)]
    fn write_rare(&mut self, msr: u32, value: u64, caps: &GuestCaps) -> Result<MsrEffect, Gp> {
        match msr {
            msr::PAT => {
                check(pat_is_valid(value))?;
                self.pat = value;
                return Ok(MsrEffect::Pat(value));
            }
            msr::TSC_AUX if caps.tsc_aux => {
                // AMD's CPUs drop the high half, Intel's refuse it.
                check(caps.vendor == Vendor::Amd || value >> 32 == 0)?;
                self.tsc_aux = value as u32;
                return Ok(MsrEffect::TscAux(self.tsc_aux));
            }
            msr::XSS if caps.xsaves => check(value == 0)?,
            msr::DEBUGCTL => check(value == 0)?,
            msr::MCG_STATUS => {
                check(value & !7 == 0)?;
                self.mcg_status = value;
            }
            _ => match self.mtrrs.write(msr, value, caps.phys_bits) {
                Some(result) => result?,
                None if caps.vendor == Vendor::Intel => self.write_intel(msr, value)?,
                None => self.write_amd(msr, value, caps)?,
            },
        }
        Ok(MsrEffect::None)
    }

    fn write_intel(&mut self, msr: u32, value: u64) -> Result<(), Gp> {
        match msr {
            msr::MISC_ENABLE => {
                check((value ^ self.misc_enable) & !MISC_ENABLE_FAST_STRINGS == 0)?;
                self.misc_enable = value;
                Ok(())
            }
            // Software clears it before it asks for the revision (SDM vol. 3, 10.11.7.1).
            msr::MICROCODE_REVISION => Ok(()),
            _ => Err(Gp),
        }
    }

    fn write_amd(&mut self, msr: u32, value: u64, caps: &GuestCaps) -> Result<(), Gp> {
        match msr {
            msr::HWCR => {
                check(value & !(HWCR_MC_STATUS_WRITE | HWCR_TSC_FREQ_SEL | HWCR_IGNORED) == 0)?;
                self.hwcr = value & HWCR_MC_STATUS_WRITE;
                Ok(())
            }
            msr::NB_CFG => {
                check(value & !NB_CFG_EXTENDED_CF8 == 0)?;
                self.nb_cfg = value;
                Ok(())
            }
            msr::VM_CR => check(value & !VM_CR_DEFINED == 0),
            // Whether LFENCE serializes is the host's affair: the write is accepted, the bit reads as it is.
            msr::DE_CFG => check(value & !DE_CFG_LFENCE_SERIALIZING == 0),
            // What reads constant takes its own value back.
            msr::SYSCFG
            | msr::IORR_FIRST..=msr::IORR_LAST
            | msr::TOP_MEM
            | msr::TOP_MEM2
            | msr::INT_PENDING
            | msr::MMIO_CFG_BASE => check(self.read_amd(msr, caps) == Ok(value)),
            _ => Err(Gp),
        }
    }
}

#[inline]
const fn check(valid: bool) -> Result<(), Gp> {
    if valid {
        Ok(())
    } else {
        Err(Gp)
    }
}

/// EFER after a WRMSR of `value` (APM vol. 2, 3.1.7): #GP for bits that do not exist, SVME among them, and for a change
/// of LME while paging. LMA keeps its value whatever is written.
pub const fn efer_after_write(value: u64, old: u64, paging: bool, caps: &GuestCaps) -> Result<u64, Gp> {
    if value & !caps.efer != 0 || (paging && (value ^ old) & EFER_LME != 0) {
        return Err(Gp);
    }
    Ok(value & !EFER_LMA | old & EFER_LMA)
}

/// Whether WRMSR of a switched MSR ([`PASSTHROUGH`]) takes `value`, where it is not the processor that decides. Bases and
/// targets are canonical; AMD's SYSENTER targets have 32 bits and take anything (APM vol. 2, 6.1.2); Intel's SFMASK has
/// no high half (SDM vol. 4, table 2-2), AMD's drops it.
pub const fn switched_is_valid(msr: u32, value: u64, caps: &GuestCaps) -> bool {
    let intel = matches!(caps.vendor, Vendor::Intel);
    match msr {
        msr::LSTAR | msr::CSTAR | msr::FS_BASE | msr::GS_BASE | msr::KERNEL_GS_BASE => {
            is_canonical(value, caps.linear_bits())
        }
        msr::SYSENTER_ESP | msr::SYSENTER_EIP => !intel || is_canonical(value, caps.linear_bits()),
        msr::SFMASK => !intel || value >> 32 == 0,
        _ => true,
    }
}

/// Whether all bits from the highest of `bits` on are the same (SDM vol. 1, 3.3.7.1).
const fn is_canonical(address: u64, bits: u8) -> bool {
    let high = address as i64 >> (bits - 1);
    high == 0 || high == -1
}

/// Whether each byte is a memory type of PAT: UC, WC, WT, WP, WB, UC- (SDM table 12-10).
pub const fn pat_is_valid(pat: u64) -> bool {
    let bytes = pat.to_le_bytes();
    let mut index = 0;
    while index < bytes.len() {
        if !matches!(bytes[index], 0 | 1 | 4..=7) {
            return false;
        }
        index += 1;
    }
    true
}

#[cfg(test)]
mod tests;
