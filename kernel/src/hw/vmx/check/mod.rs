//! Why a VM entry failed, in words: the checks that the processor makes, made again. SDM vol. 3, chapter 27.
//!
//! The processor says that an entry failed, not which of its many rules broke. Here are the rules in
//! the manual's order; the first broken one is the explanation. The sections in parentheses are the manual's.
//!
//! The rules for the guest's state work on plain values ([`GuestState`]), so that they also decide, on a CPU
//! that cannot run every guest state, which ones must be emulated.

mod controls;
mod guest;
mod host;
mod non_register;
#[cfg(test)]
mod sample;
mod segments;
mod state;

pub use guest::guest_state_error;
pub use state::{single_step_pending, GuestSegment, GuestState, GuestTable};

use super::capabilities::VmxCapabilities;
use super::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use super::exit::{reason, ExitReason};
use super::instruction_error;
use super::vmcs::{self, Fields};

/// Gives the words of the first rule whose condition, which says that it is broken, holds.
macro_rules! broken {
    ($($condition:expr => $words:expr;)*) => {
        $(if $condition {
            return Some($words);
        })*
    };
}
use broken;

/// How an entry failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// VMLAUNCH or VMRESUME failed with this VM-instruction error.
    Instruction(u32),
    /// The entry ended in an exit with this reason.
    Exit(ExitReason),
}

/// VM-instruction error: invalid control fields.
const ERROR_CONTROLS: u32 = 7;
/// VM-instruction error: invalid host-state fields.
const ERROR_HOST: u32 = 8;

/// Says in words why the entry with the current VMCS failed.
pub fn explain(fields: &impl Fields, capabilities: &VmxCapabilities, failure: Failure) -> &'static str {
    let settings = Settings::read(fields);
    match failure {
        // Only a rule of the named area can be the reason, unless this CPU has one that is not known here.
        Failure::Instruction(ERROR_CONTROLS) => controls::error(fields, &settings, capabilities).unwrap_or(
            "VM entry: invalid control fields; perhaps the TPR threshold is above the virtual TPR (27.2.1.1)",
        ),
        Failure::Instruction(ERROR_HOST) => {
            host::error(fields, &settings, capabilities).unwrap_or(instruction_error::describe(ERROR_HOST))
        }
        Failure::Instruction(error) => instruction_error::describe(error),
        Failure::Exit(exit) => match exit.basic() {
            reason::INVALID_GUEST_STATE => {
                let unrestricted = settings.secondary.contains(Secondary::UNRESTRICTED_GUEST);
                let state = GuestState::read(fields, &settings);
                guest_state_error(&state, capabilities, unrestricted)
                    .unwrap_or_else(|| qualification_words(fields.read(vmcs::EXIT_QUALIFICATION)))
            }
            reason::MSR_LOADING => "VM entry: an MSR of the MSR-load area could not be loaded (27.4)",
            reason::ENTRY_MACHINE_CHECK => "VM entry: a machine check occurred (27.9)",
            _ => "VM entry failed for a reason that the manual does not number",
        },
    }
}

/// What the exit qualification of an entry failure says. SDM vol. 3, 27.8.
const fn qualification_words(qualification: u64) -> &'static str {
    match qualification {
        2 => "guest PDPTEs: could not be loaded (27.3.1.6)",
        3 => "guest interruptibility: no NMI can be injected in the shadow of STI (27.3.1.5)",
        4 => "VMCS link pointer: invalid (27.3.1.5)",
        _ => "the hardware refused the guest's state, although it breaks no rule that is known",
    }
}

/// The control fields that say which rules apply.
#[derive(Clone, Copy, Debug)]
struct Settings {
    pin: Pin,
    primary: Primary,
    /// Empty unless activated: then the processor works as if all were 0 (27.2.1.1).
    secondary: Secondary,
    exit: ExitControls,
    entry: EntryControls,
}

impl Settings {
    fn read(fields: &impl Fields) -> Self {
        let primary = Primary::from_bits_retain(fields.read(vmcs::PRIMARY_CONTROLS));
        let secondary = if primary.contains(Primary::SECONDARY_CONTROLS) {
            Secondary::from_bits_retain(fields.read(vmcs::SECONDARY_CONTROLS))
        } else {
            Secondary::empty()
        };
        Self {
            pin: Pin::from_bits_retain(fields.read(vmcs::PIN_CONTROLS)),
            primary,
            secondary,
            exit: ExitControls::from_bits_retain(fields.read(vmcs::EXIT_CONTROLS)),
            entry: EntryControls::from_bits_retain(fields.read(vmcs::ENTRY_CONTROLS)),
        }
    }
}

impl VmxCapabilities {
    /// Whether `address` has its low `zero_bits` clear and lies within the physical-address width, or within
    /// 32 bits where VMX structures must.
    fn is_address(&self, address: u64, zero_bits: u32) -> bool {
        let width = if self.addresses_are_32_bits() { 32 } else { self.physical_address_bits };
        address & !(u64::MAX << zero_bits) == 0 && address >> width == 0
    }

    /// Whether `address` is canonical for the processor's linear-address width.
    fn is_canonical(&self, address: u64) -> bool {
        let unused = 64 - u32::from(self.linear_address_bits);
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// Bits of CR3 that must be 0: above the physical-address width, but for those of LAM where the CPU has
    /// it.
    fn cr3_reserved(&self) -> u64 {
        const CR4_LAM_SUP: u64 = 1 << 28;
        const CR3_LAM: u64 = 3 << 61;
        let lam = if self.cr4_fixed1 & CR4_LAM_SUP != 0 { CR3_LAM } else { 0 };
        (u64::MAX << self.physical_address_bits) & !lam
    }
}

/// CR0.PE.
const CR0_PE: u64 = 1 << 0;
/// CR0.WP.
const CR0_WP: u64 = 1 << 16;
/// CR0.PG.
const CR0_PG: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// CR4.PCIDE.
const CR4_PCIDE: u64 = 1 << 17;
/// CR4.CET.
const CR4_CET: u64 = 1 << 23;
/// EFER.LME.
const EFER_LME: u64 = 1 << 8;
/// EFER.LMA.
const EFER_LMA: u64 = 1 << 10;
/// Bits of EFER other than SCE, LME, LMA and NXE.
const EFER_RESERVED: u64 = !(1 | EFER_LME | EFER_LMA | 1 << 11);
/// Bits of IA32_PERF_GLOBAL_CTRL that no CPU has.
const PERF_GLOBAL_RESERVED: u64 = 0xfffe_0000_ffff_0000;
/// Reserved bits of IA32_S_CET (vol. 1, 17.1.2).
const S_CET_RESERVED: u64 = 0x3c0;
/// SUPPRESS and TRACKER of IA32_S_CET, which exclude each other.
const S_CET_TRACKING: u64 = 3 << 10;

/// Whether each byte of a PAT is a memory type that WRMSR accepts: 0, 1, 4, 5, 6 or 7.
fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes().iter().all(|&kind| matches!(kind, 0 | 1 | 4..=7))
}

#[cfg(test)]
mod tests {
    use super::sample::{capabilities, Table};
    use super::*;

    fn after_exit(table: &Table) -> &'static str {
        explain(table, &capabilities(), Failure::Exit(ExitReason(0x8000_0021)))
    }

    #[test]
    fn failed_entries_are_explained_by_the_guests_state_first() {
        let mut table = Table::long_mode();
        table.set(vmcs::EXIT_QUALIFICATION, 3u64);
        assert!(after_exit(&table).contains("shadow of STI"));
        table.set(vmcs::GUEST_RFLAGS, 0u64);
        assert!(after_exit(&table).starts_with("guest RFLAGS"));
    }

    #[test]
    fn what_no_rule_explains_is_told_by_the_qualification() {
        for (qualification, words) in
            [(0u64, "no rule that is known"), (2, "PDPTEs"), (3, "NMI"), (4, "link pointer")]
        {
            let mut table = Table::long_mode();
            table.set(vmcs::EXIT_QUALIFICATION, qualification);
            assert!(after_exit(&table).contains(words));
        }
        let table = Table::long_mode();
        for (exit, words) in
            [(0x8000_0022, "MSR"), (0x8000_0029, "machine check"), (0x8000_0030, "not number")]
        {
            let said = explain(&table, &capabilities(), Failure::Exit(ExitReason(exit)));
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn instruction_errors_are_explained_by_controls_and_host_state() {
        let mut table = Table::long_mode();
        let say = |table: &Table, error| explain(table, &capabilities(), Failure::Instruction(error));
        assert!(say(&table, 7).contains("TPR threshold"));
        assert!(say(&table, 8).contains("invalid host-state"));
        assert!(say(&table, 26).contains("MOV SS"));
        table.set(vmcs::HOST_CS_SELECTOR, 0u16);
        table.set(vmcs::VPID, 0u16);
        assert!(say(&table, 7).starts_with("VPID"));
        assert!(say(&table, 8).starts_with("host CS"));
    }

    #[test]
    fn canonical_addresses_depend_on_the_width() {
        let mut wide = capabilities();
        assert!(wide.is_canonical(0x7fff_ffff_ffff) && wide.is_canonical(0xffff_8000_0000_0000));
        assert!(!wide.is_canonical(0x8000_0000_0000));
        wide.linear_address_bits = 57;
        assert!(wide.is_canonical(0x8000_0000_0000) && !wide.is_canonical(1 << 56));
    }
}
