//! The first state of a guest's boot CPU.
use super::low::LowMemory;
use super::Problem;
use crate::vm::ram::GuestRam;

/// A segment register. `attributes` packs descriptor bits 47:40 into bits 7:0 and 55:52 into bits 11:8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Type, S, DPL, P in bits 7:0; AVL, L, D/B, G in bits 11:8.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// Base and limit of GDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Operating mode of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 32-bit protected mode, paging off.
    Protected32,
    /// 64-bit mode, identity-mapped.
    Long64,
}

/// Registers that are not at their reset value when the guest starts. General-purpose registers not named here are
/// zero; IDTR is empty; LDTR is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// Operating mode.
    pub mode: Mode,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer; the protocols promise no stack.
    pub rsp: u64,
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// RFLAGS: only the bit that is always one, so interrupts are off.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the guest sees it.
    pub efer: u64,
    /// CS.
    pub cs: Segment,
    /// DS, ES, FS, GS and SS alike.
    pub data: Segment,
    /// Task register: a busy TSS, as the CPU wants one to be.
    pub tr: Segment,
    /// The GDT that the selectors come from.
    pub gdtr: TableRegister,
}

/// Selector of the code segment. Linux Documentation/arch/x86/boot.rst: __BOOT_CS.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments: __BOOT_DS.
const DATA_SELECTOR: u16 = 0x18;
/// Type execute/read accessed, S, P, and G; D/B or L comes with the mode. AMD APM vol. 2, 4.7.
const CODE: u16 = 0x89b;
/// Type read/write accessed, S, P; D/B and G.
const DATA: u16 = 0xc93;
/// L: 64-bit code.
const LONG: u16 = 1 << 9;
/// D/B: 32-bit code.
const DEFAULT_32: u16 = 1 << 10;
/// Type busy TSS, P. AMD APM vol. 2, 4.8.
const BUSY_TSS: u16 = 0x8b;

/// CR0: protected mode, and the 80387 bit, which is always one.
const CR0_PE_ET: u64 = 0x11;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
const RFLAGS_ALWAYS: u64 = 2;

impl EntryState {
    /// 32-bit protected mode at `eip`, segments flat, paging off.
    pub(super) fn protected(low: &mut LowMemory<'_, impl GuestRam>, eip: u64) -> Result<Self, Problem> {
        Self::flat(low, Mode::Protected32, eip)
    }

    /// 64-bit mode at `rip`, the first 4 GiB identity-mapped.
    pub(super) fn long(low: &mut LowMemory<'_, impl GuestRam>, rip: u64) -> Result<Self, Problem> {
        let state = Self::flat(low, Mode::Long64, rip)?;
        Ok(Self {
            cr0: state.cr0 | CR0_PG,
            cr3: low.put_identity_map()?,
            cr4: CR4_PAE,
            efer: EFER_LME_LMA,
            ..state
        })
    }

    fn flat(low: &mut LowMemory<'_, impl GuestRam>, mode: Mode, rip: u64) -> Result<Self, Problem> {
        let flat = |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0 };
        let code_size = match mode {
            Mode::Protected32 => DEFAULT_32,
            Mode::Long64 => LONG,
        };
        let cs = flat(CODE_SELECTOR, CODE | code_size);
        let data = flat(DATA_SELECTOR, DATA);
        let gdt = [0, 0, descriptor(cs), descriptor(data)].map(u64::to_le_bytes);
        let base = low.put(gdt.as_flattened(), 8)?;
        Ok(Self {
            mode,
            rip,
            rsp: 0,
            rax: 0,
            rbx: 0,
            rsi: 0,
            rflags: RFLAGS_ALWAYS,
            cr0: CR0_PE_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            cs,
            data,
            tr: Segment { selector: 0, attributes: BUSY_TSS, limit: 0x67, base: 0 },
            gdtr: TableRegister { base, limit: 4 * 8 - 1 },
        })
    }
}

/// The descriptor of a flat segment: base 0, limit 4 GiB.
fn descriptor(segment: Segment) -> u64 {
    const LIMIT: u64 = 0x000f_0000_0000_ffff;
    let attributes = u64::from(segment.attributes);
    LIMIT | (attributes & 0xff) << 40 | (attributes >> 8) << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        let flat = |attributes| Segment { selector: 0, attributes, limit: u32::MAX, base: 0 };
        assert_eq!(descriptor(flat(CODE | LONG)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(flat(CODE | DEFAULT_32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(flat(DATA)), 0x00cf_9300_0000_ffff);
    }
}
