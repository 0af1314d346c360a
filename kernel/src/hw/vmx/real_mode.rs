//! Real mode and unpaged protected mode on a CPU without unrestricted guest, where the processor cannot leave protected,
//! paged mode in VMX operation (SDM vol. 3, 24.8): real mode runs as virtual-8086 mode, and unpaged code on identity tables.
//!
//! The tables and the TSS lie in guest-physical pages of their own, which the guest can read but not change:
//!
//! - one page directory of 4 MiB pages that maps all 4 GiB to themselves;
//! - a TSS whose interrupt redirection bitmap and I/O permission bitmap are all zeros, so that INT n goes through the
//!   interrupt vector table at address zero by itself (SDM vol. 3, 21.3, method 5 of table 21-2) and port accesses exit as in
//!   real mode. With the table elsewhere, real mode is emulated.
//!
//! One thing shows: PUSHF and POPF find an IOPL of 3, whatever IOPL the guest sets, since the processor has it so and lets
//! no program of virtual-8086 mode change it (SDM vol. 3, 21.2.7).
use crate::hw::{CpuState, GuestPage, Segment, TableRegister};
use crate::vm::msr::{EFER_LMA, EFER_LME};

/// Guest-physical address of the identity tables' page directory: below the usual place of firmware, away from all devices.
pub const IDENTITY_TABLE: u64 = 0xfffb_c000;
/// Guest-physical address of the TSS, three pages.
pub const TASK_STATE: u64 = IDENTITY_TABLE + 0x1000;
/// Limit of the TSS: 104 bytes, 32 bytes of interrupt redirection, 8 KiB of I/O permission and a last byte of ones.
pub const TASK_STATE_LIMIT: u32 = 104 + 32 + 0x2000;
/// Offset of the I/O map base in a 32-bit TSS (SDM vol. 3, figure 8-2).
const IO_MAP_BASE: usize = 102;
/// Where the I/O permission bitmap begins; the 32 bytes before it redirect interrupts.
const IO_MAP: u16 = 104 + 32;

/// The pages, for the VM's memory.
pub const GUEST_PAGES: &[GuestPage] = &[
    GuestPage { gpa: IDENTITY_TABLE, fill: fill_identity_table },
    GuestPage { gpa: TASK_STATE, fill: fill_task_state },
    // More zeros of the I/O permission bitmap.
    GuestPage { gpa: TASK_STATE + 0x1000, fill: |_| {} },
    GuestPage { gpa: TASK_STATE + 0x2000, fill: fill_end_of_io_map },
];

/// P, R/W, U/S, A, D and PS of a page-directory entry for 4 MiB (SDM vol. 3, table 4-4). With A and D set the processor
/// has nothing to write there.
const LARGE_PAGE: u32 = 0xe7;

fn fill_identity_table(page: &mut [u8; 4096]) {
    for (index, entry) in page.chunks_exact_mut(4).enumerate() {
        entry.copy_from_slice(&((index as u32) << 22 | LARGE_PAGE).to_le_bytes());
    }
}

fn fill_task_state(page: &mut [u8; 4096]) {
    page[IO_MAP_BASE..IO_MAP_BASE + 2].copy_from_slice(&IO_MAP.to_le_bytes());
}

fn fill_end_of_io_map(page: &mut [u8; 4096]) {
    page[(TASK_STATE_LIMIT as usize) & 0xfff] = 0xff;
}

/// CR4.VME: interrupt redirection of virtual-8086 mode.
const CR4_VME: u64 = 1 << 0;
/// CR4.PSE: 4 MiB pages.
const CR4_PSE: u64 = 1 << 4;
/// Bits of CR4 that mean the same with and without paging: VME, PVI, TSD, DE, MCE, PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE,
/// OSXSAVE.
const CR4_KEPT: u64 = 0xf | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 16 | 1 << 18;
const CR0_PE: u64 = 1 << 0;
/// CR0.AM: has no effect in real mode, which runs at CPL 0.
const CR0_AM: u64 = 1 << 18;
const CR0_PG: u64 = 1 << 31;
/// RFLAGS.VM.
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS.IOPL: at 3, CLI, STI, PUSHF, POPF, INT n and IRET of virtual-8086 mode do what they do in real mode.
pub const RFLAGS_IOPL: u64 = 3 << 12;
/// Access rights that every segment has in virtual-8086 mode (SDM vol. 3, 27.3.1.2): data, writable, accessed, DPL 3.
pub const VM86_RIGHTS: u32 = 0xf3;
/// Access rights of the TSS: a busy 32-bit TSS, present.
pub const TASK_RIGHTS: u32 = 0x8b;

/// What the VMCS holds of the guest's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// The state itself.
    #[default]
    Own,
    /// The state of unpaged protected mode, with paging on and identity tables.
    Unpaged,
    /// The state of real mode as virtual-8086 mode.
    Vm86,
}

/// CR0 of the VMCS for the guest's `cr0`, but for bits that VMX fixes.
pub const fn cr0(cr0: u64, form: Form) -> u64 {
    match form {
        Form::Own => cr0,
        Form::Unpaged => cr0 | CR0_PE | CR0_PG,
        Form::Vm86 => cr0 & !CR0_AM | CR0_PE | CR0_PG,
    }
}

/// CR4 of the VMCS for the guest's `cr4`, but for bits that VMX fixes.
pub const fn cr4(cr4: u64, form: Form) -> u64 {
    match form {
        Form::Own => cr4,
        Form::Unpaged => cr4 & CR4_KEPT | CR4_PSE,
        Form::Vm86 => cr4 & CR4_KEPT | CR4_PSE | CR4_VME,
    }
}

/// EFER of the VMCS for the guest's `efer`: while the guest is unpaged the hardware, which is not, must not be in long mode.
pub const fn efer(efer: u64, form: Form) -> u64 {
    match form {
        Form::Own => efer,
        Form::Unpaged | Form::Vm86 => efer & !(EFER_LME | EFER_LMA),
    }
}

/// The form in which a guest in this state can be entered; None if it must be emulated until it can.
pub fn form(state: &CpuState) -> Option<Form> {
    match (state.cr0 & CR0_PE != 0, state.cr0 & CR0_PG != 0) {
        (true, true) => Some(Form::Own),
        (true, false) => Some(Form::Unpaged),
        (false, _) => {
            (has_usual_vectors(&state.idtr) && state.segments.iter().all(fits_vm86)).then_some(Form::Vm86)
        }
    }
}

/// Whether INT n finds its vector where virtual-8086 mode looks for it: at address zero, without a limit.
fn has_usual_vectors(idtr: &TableRegister) -> bool {
    idtr.base == 0 && idtr.limit >= 0x3ff
}

/// Whether virtual-8086 mode can hold the segment: its base follows from its selector, it has 64 KiB and grows up.
fn fits_vm86(segment: &Segment) -> bool {
    const PRESENT: u16 = 1 << 7;
    const BIG: u16 = 1 << 10;
    segment.base == u64::from(segment.selector) << 4
        && segment.limit == 0xffff
        && segment.attributes & (PRESENT | BIG) == PRESENT
}

/// RFLAGS in virtual-8086 mode for `rflags` of real mode.
pub const fn to_vm86_flags(rflags: u64) -> u64 {
    rflags | RFLAGS_VM | RFLAGS_IOPL
}

/// RFLAGS of real mode from those of virtual-8086 mode; IOPL, which the guest cannot have changed there, was `iopl`.
pub const fn from_vm86_flags(rflags: u64, iopl: u64) -> u64 {
    rflags & !(RFLAGS_VM | RFLAGS_IOPL) | iopl & RFLAGS_IOPL
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(page: &GuestPage) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        (page.fill)(&mut bytes);
        bytes
    }

    #[test]
    fn the_identity_tables_map_all_of_32_bits_to_itself() {
        let page = filled(&GUEST_PAGES[0]);
        for linear in [0u32, 0x7c00, 0x40_0000, 0xfee0_0300, u32::MAX] {
            let entry = u32::from_le_bytes(*page[(linear >> 22) as usize * 4..].first_chunk().unwrap());
            assert_eq!(entry & 0xffc0_0000 | linear & 0x3f_ffff, linear);
            assert_eq!(entry & 0xe7, 0xe7, "present, writable, user, accessed, dirty, large");
            assert_eq!(entry & 0x3f_ff00, 0, "no PAT, no high address bits");
        }
    }

    #[test]
    fn the_task_state_redirects_all_interrupts_and_permits_all_ports() {
        let bytes: std::vec::Vec<u8> = GUEST_PAGES[1..].iter().flat_map(filled).collect();
        let io_map = usize::from(u16::from_le_bytes([bytes[102], bytes[103]]));
        let end = TASK_STATE_LIMIT as usize;
        assert_eq!(io_map + 0x2000, end);
        assert!(bytes[io_map - 32..end].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[end], 0xff, "the byte behind the bitmap");
        assert!(GUEST_PAGES.windows(2).all(|pair| pair[0].gpa + 0x1000 == pair[1].gpa));
    }

    #[test]
    fn real_mode_runs_as_vm86_only_with_segments_that_it_can_hold() {
        let state = CpuState::startup(0x9a);
        assert_eq!(form(&state), Some(Form::Vm86));
        // At reset CS has a base that no selector gives.
        assert_eq!(form(&CpuState::reset()), None);
        for change in [
            |segment: &mut Segment| segment.limit = 0xffff_ffff,
            |segment: &mut Segment| segment.base = 0x10_0000,
            |segment: &mut Segment| segment.attributes |= 1 << 10,
            |segment: &mut Segment| segment.attributes = 0,
        ] {
            for index in 0..6 {
                let mut state = state.clone();
                change(&mut state.segments[index]);
                assert_eq!(form(&state), None);
                state.cr0 = 0x11;
                assert_eq!(form(&state), Some(Form::Unpaged));
                state.cr0 = 0x8000_0011;
                assert_eq!(form(&state), Some(Form::Own));
            }
        }
    }

    #[test]
    fn real_mode_with_vectors_elsewhere_is_emulated() {
        for (base, limit, expected) in [
            (0, 0xffff, Some(Form::Vm86)),
            (0, 0x3ff, Some(Form::Vm86)),
            (0, 0x3fe, None),
            (0xa000, 0x3ff, None),
            (0, 0, None),
        ] {
            let state = CpuState { idtr: TableRegister { base, limit }, ..CpuState::startup(0x9a) };
            assert_eq!(form(&state), expected, "{base:x} {limit:x}");
        }
    }

    #[test]
    fn unpaged_code_keeps_what_does_not_concern_paging() {
        const OSFXSR: u64 = 1 << 9;
        const PAE: u64 = 1 << 5;
        for form in [Form::Unpaged, Form::Vm86] {
            assert_eq!(cr4(OSFXSR | PAE | 1 << 7 | 1 << 20, form) & !CR4_VME, OSFXSR | CR4_PSE);
            assert_eq!(cr0(0x10, form), 0x8000_0011);
            assert_eq!(efer(EFER_LME | 1, form), 1);
        }
        assert_eq!(cr4(OSFXSR, Form::Vm86) & CR4_VME, CR4_VME);
        assert_eq!(cr0(CR0_AM | 0x10, Form::Vm86) & CR0_AM, 0, "no alignment checks at CPL 0");
        assert_eq!(
            (cr0(0x11, Form::Own), cr4(PAE, Form::Own), efer(EFER_LME, Form::Own)),
            (0x11, PAE, EFER_LME)
        );
    }

    #[test]
    fn flags_survive_virtual_8086_mode() {
        for iopl in [0, 1 << 12, 2 << 12, 3 << 12] {
            let flags = 0x246 | iopl;
            let vm86 = to_vm86_flags(flags);
            assert_eq!(vm86 & (RFLAGS_VM | RFLAGS_IOPL), RFLAGS_VM | RFLAGS_IOPL);
            assert_eq!(from_vm86_flags(vm86, iopl), flags);
        }
    }
}
