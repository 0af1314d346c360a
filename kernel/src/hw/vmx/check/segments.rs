//! Rules for the guest's segment registers. SDM vol. 3, 27.3.1.2.
use super::broken;
use super::state::{GuestSegment, GuestState, CS, SS};
use super::CR0_PE;
use crate::hw::vmx::access_rights::{CODE_OR_DATA, DEFAULT_BIG, GRANULARITY, LONG, RESERVED, UNUSABLE};
use crate::hw::vmx::capabilities::VmxCapabilities;
use crate::hw::vmx::vmcs::{LDTR, TR};

/// Words about segment register `n`.
macro_rules! about {
    ($n:expr, $words:literal) => {{
        const WORDS: [&str; 8] = [
            concat!("guest ES: ", $words, " (27.3.1.2)"),
            concat!("guest CS: ", $words, " (27.3.1.2)"),
            concat!("guest SS: ", $words, " (27.3.1.2)"),
            concat!("guest DS: ", $words, " (27.3.1.2)"),
            concat!("guest FS: ", $words, " (27.3.1.2)"),
            concat!("guest GS: ", $words, " (27.3.1.2)"),
            concat!("guest LDTR: ", $words, " (27.3.1.2)"),
            concat!("guest TR: ", $words, " (27.3.1.2)"),
        ];
        WORDS[$n]
    }};
}

/// Selector bit 2: the descriptor is in the LDT.
const TABLE_INDICATOR: u16 = 1 << 2;
/// Type of a writable data segment that was accessed: what unrestricted guests may have in CS in real mode.
const READ_WRITE_DATA: u32 = 3;
/// Access rights of every segment in virtual-8086 mode.
const VIRTUAL_8086_RIGHTS: u32 = 0xf3;

/// The first broken rule.
pub(super) fn error(
    state: &GuestState,
    capabilities: &VmxCapabilities,
    unrestricted: bool,
) -> Option<&'static str> {
    selectors(state, unrestricted)
        .or_else(|| bases(state, capabilities))
        .or_else(|| {
            (0..LDTR).find_map(|n| {
                if state.virtual_8086() {
                    virtual_8086(state, n)
                } else {
                    code_or_data(state, n, unrestricted)
                }
            })
        })
        .or_else(|| task_register(state))
        .or_else(|| ldtr(state))
}

fn selectors(state: &GuestState, unrestricted: bool) -> Option<&'static str> {
    let [cs, ss, ldtr, tr] = [CS, SS, LDTR, TR].map(|n| &state.segments[n]);
    broken! {
        tr.selector & TABLE_INDICATOR != 0 => about!(TR, "the selector's TI must be 0");
        ldtr.usable() && ldtr.selector & TABLE_INDICATOR != 0 => about!(LDTR, "the selector's TI must be 0");
        !state.virtual_8086() && !unrestricted && ss.rpl() != cs.rpl() =>
            about!(SS, "the selector's RPL must be that of CS");
    }
    None
}

fn bases(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    (0..state.segments.len()).find_map(|n| {
        let segment = &state.segments[n];
        match n {
            CS => (segment.base >> 32 != 0).then_some(about!(n, "bits 63:32 of the base must be 0")),
            // ES, SS, DS.
            0 | SS | 3 => (segment.usable() && segment.base >> 32 != 0)
                .then_some(about!(n, "bits 63:32 of the base must be 0")),
            LDTR => (segment.usable() && !capabilities.is_canonical(segment.base))
                .then_some(about!(n, "the base is not canonical")),
            _ => (!capabilities.is_canonical(segment.base)).then_some(about!(n, "the base is not canonical")),
        }
    })
}

fn virtual_8086(state: &GuestState, n: usize) -> Option<&'static str> {
    let segment = &state.segments[n];
    broken! {
        segment.base != u64::from(segment.selector) << 4 =>
            about!(n, "in virtual-8086 mode the base must be the selector times 16");
        segment.limit != 0xffff => about!(n, "in virtual-8086 mode the limit must be ffffh");
        segment.rights != VIRTUAL_8086_RIGHTS =>
            about!(n, "in virtual-8086 mode the access rights must be f3h");
    }
    None
}

/// Rules for CS, and for SS, DS, ES, FS and GS if usable, outside virtual-8086 mode.
fn code_or_data(state: &GuestState, n: usize, unrestricted: bool) -> Option<&'static str> {
    let segment = &state.segments[n];
    // SS.DPL is the CPL even if SS is unusable.
    match n {
        CS => code_segment(state, unrestricted),
        SS => stack_segment(state, unrestricted),
        _ if segment.usable() => data_segment(segment, n, unrestricted),
        _ => None,
    }
    .or_else(|| if n == CS || segment.usable() { common(segment, n) } else { None })
}

fn code_segment(state: &GuestState, unrestricted: bool) -> Option<&'static str> {
    let cs = &state.segments[CS];
    let cpl = state.segments[SS].dpl();
    broken! {
        cs.kind() == READ_WRITE_DATA && !unrestricted =>
            about!(CS, "access rights say a writable data segment, which only an unrestricted guest may have");
        cs.kind() != READ_WRITE_DATA && cs.kind() & 0b1001 != 0b1001 =>
            about!(CS, "access rights must say an accessed code segment");
        cs.kind() == READ_WRITE_DATA && cs.dpl() != 0 =>
            about!(CS, "access rights say a writable data segment, whose DPL must be 0");
        matches!(cs.kind(), 9 | 11) && cs.dpl() != cpl =>
            about!(CS, "the DPL of a non-conforming code segment must be that of SS");
        matches!(cs.kind(), 13 | 15) && cs.dpl() > cpl =>
            about!(CS, "the DPL of a conforming code segment must not be above that of SS");
        state.long_mode && cs.rights & (LONG | DEFAULT_BIG) == LONG | DEFAULT_BIG =>
            about!(CS, "D/B must be 0 in 64-bit mode");
    }
    None
}

fn stack_segment(state: &GuestState, unrestricted: bool) -> Option<&'static str> {
    let ss = &state.segments[SS];
    broken! {
        ss.usable() && !matches!(ss.kind(), 3 | 7) =>
            about!(SS, "access rights must say an accessed, writable data segment");
        !unrestricted && ss.dpl() != ss.rpl() => about!(SS, "the DPL must be the selector's RPL");
        ss.dpl() != 0 && (state.segments[CS].kind() == READ_WRITE_DATA || state.cr0 & CR0_PE == 0) =>
            about!(SS, "the DPL must be 0 in real mode");
    }
    None
}

fn data_segment(segment: &GuestSegment, n: usize, unrestricted: bool) -> Option<&'static str> {
    broken! {
        segment.kind() & 1 == 0 => about!(n, "access rights must say an accessed segment");
        segment.kind() & 0b1010 == 0b1000 =>
            about!(n, "access rights say a code segment that is not readable");
        !unrestricted && segment.kind() <= 11 && segment.dpl() < segment.rpl() =>
            about!(n, "the DPL must not be below the selector's RPL");
    }
    None
}

fn common(segment: &GuestSegment, n: usize) -> Option<&'static str> {
    broken! {
        segment.rights & CODE_OR_DATA == 0 => about!(n, "access rights must say a code or data segment");
        !segment.present() => about!(n, "the segment must be present");
    }
    limit_and_reserved(segment, n)
}

fn limit_and_reserved(segment: &GuestSegment, n: usize) -> Option<&'static str> {
    let pages = segment.rights & GRANULARITY != 0;
    broken! {
        segment.rights & RESERVED != 0 => about!(n, "reserved bits of the access rights must be 0");
        segment.limit & 0xfff != 0xfff && pages =>
            about!(n, "G must be 0, for limit bits 11:0 are not all 1");
        segment.limit >> 20 != 0 && !pages => about!(n, "G must be 1, for limit bits 31:20 are not all 0");
    }
    None
}

fn task_register(state: &GuestState) -> Option<&'static str> {
    let tr = &state.segments[TR];
    broken! {
        state.long_mode && tr.kind() != 11 => about!(TR, "access rights must say a busy 64-bit TSS");
        !matches!(tr.kind(), 3 | 11) => about!(TR, "access rights must say a busy TSS");
        tr.rights & CODE_OR_DATA != 0 => about!(TR, "access rights must say a system segment");
        !tr.present() => about!(TR, "the segment must be present");
        tr.rights & UNUSABLE != 0 => about!(TR, "the register must be usable");
    }
    limit_and_reserved(tr, TR)
}

fn ldtr(state: &GuestState) -> Option<&'static str> {
    let ldtr = &state.segments[LDTR];
    if !ldtr.usable() {
        return None;
    }
    broken! {
        ldtr.kind() != 2 => about!(LDTR, "access rights must say an LDT");
        ldtr.rights & CODE_OR_DATA != 0 => about!(LDTR, "access rights must say a system segment");
        !ldtr.present() => about!(LDTR, "the segment must be present");
    }
    limit_and_reserved(ldtr, LDTR)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{
        compatibility_mode, expect, long_mode, pae, plain_error, protected_mode, virtual_8086, Table,
    };
    use super::*;
    use crate::hw::vmx::vmcs::{self, GUEST_SEGMENTS};
    use crate::hw::CpuState;

    const NAMES: [&str; 8] = ["ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"];

    /// Breaks a rule of segment register `n`.
    fn breaks(valid: &Table, n: usize, words: &str, change: impl Fn(&mut Table)) {
        let mut table = valid.clone();
        change(&mut table);
        let said = table.guest_error().unwrap_or("nothing");
        let wanted = std::format!("guest {}: {words}", NAMES[n]);
        assert!(said.starts_with(&wanted), "wanted {wanted:?}, was {said:?}");
    }

    #[test]
    fn guests_of_every_mode_can_be_entered() {
        for state in [protected_mode(), pae(), compatibility_mode(), long_mode(), virtual_8086()] {
            for unrestricted in [true, false] {
                assert_eq!(Table::of(&state, unrestricted).guest_error(), None);
                assert_eq!(plain_error(&state, unrestricted), None);
            }
        }
        assert_eq!(Table::of(&CpuState::reset(), true).guest_error(), None);
        assert_eq!(plain_error(&CpuState::reset(), true), None);
        assert_eq!(plain_error(&CpuState::startup(0x9a), true), None);
    }

    #[test]
    fn real_mode_needs_an_unrestricted_guest() {
        assert!(plain_error(&CpuState::reset(), false).unwrap().starts_with("guest CR0: PE"));
    }

    #[test]
    fn the_step_from_real_to_protected_mode_needs_an_unrestricted_guest() {
        // MOV to CR0 has set PE, and the segments are still those of real mode.
        let mut state = CpuState::startup(0x9a);
        state.cr0 = protected_mode().cr0;
        state.segments[SS] = crate::hw::Segment::real_mode(0x9a02, 0x93);
        assert_eq!(plain_error(&state, true), None);
        assert!(plain_error(&state, false).unwrap().starts_with("guest SS: the selector's RPL"));
        state.segments[CS].selector |= 2;
        assert!(plain_error(&state, false).unwrap().starts_with("guest SS: the DPL must be the selector's"));
        state.segments[CS].selector &= !2;
        state.segments[SS].selector &= !2;
        state.segments[3].selector |= 1;
        assert!(plain_error(&state, false).unwrap().starts_with("guest DS: the DPL"));
        state.segments[CS].attributes = 0x93;
        assert_eq!(plain_error(&state, true), None);
        assert!(plain_error(&state, false).unwrap().starts_with("guest CS: access rights say a writable"));
    }

    #[test]
    fn selectors_and_bases() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest TR: the selector's TI", |t| t.or(vmcs::GUEST_TR_SELECTOR, 4u16)),
                ("guest LDTR: the selector's TI", |t| t.or(vmcs::GUEST_LDTR_SELECTOR, 4u16)),
                ("guest TR: the base", |t| t.set(vmcs::GUEST_TR_BASE, 1u64 << 47)),
                ("guest FS: the base", |t| t.set(vmcs::GUEST_FS_BASE, 1u64 << 47)),
                ("guest GS: the base", |t| t.set(vmcs::GUEST_GS_BASE, 1u64 << 47)),
                ("guest LDTR: the base", |t| t.set(vmcs::GUEST_LDTR_BASE, 1u64 << 47)),
                ("guest CS: bits 63:32", |t| t.set(vmcs::GUEST_CS_BASE, 1u64 << 32)),
                ("guest DS: bits 63:32", |t| t.set(vmcs::GUEST_DS_BASE, 1u64 << 32)),
                ("guest ES: bits 63:32", |t| t.set(vmcs::GUEST_ES_BASE, 1u64 << 32)),
            ],
        );
        expect(
            &Table::of(&protected_mode(), false),
            Table::guest_error,
            &[
                ("guest SS: bits 63:32", |t| t.set(vmcs::GUEST_SS_BASE, 1u64 << 32)),
                ("guest SS: the selector's RPL", |t| t.or(vmcs::GUEST_SS_SELECTOR, 3u16)),
            ],
        );
    }

    #[test]
    fn unusable_registers_are_free() {
        let mut table = Table::long_mode();
        for n in [0, SS, 3, LDTR] {
            let fields = &GUEST_SEGMENTS[n];
            table.set(fields.access_rights, UNUSABLE);
            table.set(fields.base, 1u64 << 63);
            table.set(fields.limit, 0x1234_5678u32);
        }
        for n in [4, 5] {
            table.set(GUEST_SEGMENTS[n].access_rights, UNUSABLE | 0xf00);
        }
        table.or(vmcs::GUEST_LDTR_SELECTOR, 4u16);
        assert_eq!(table.guest_error(), None);
    }

    #[test]
    fn virtual_8086_mode() {
        let valid = Table::of(&virtual_8086(), false);
        for (n, fields) in GUEST_SEGMENTS.iter().enumerate().take(LDTR) {
            // A base above 4 GiB breaks an earlier rule of some.
            breaks(&valid, n, "in virtual-8086 mode the base", |t| t.or(fields.base, 1u64));
            breaks(&valid, n, "in virtual-8086 mode the limit", |t| t.set(fields.limit, 0xfffeu32));
            for rights in [0xfbu32, 0xf1, 0x93, 0x40f3, 0x1_00f3] {
                breaks(&valid, n, "in virtual-8086 mode the access rights", |t| {
                    t.set(fields.access_rights, rights);
                });
            }
        }
    }

    #[test]
    fn types_and_privileges_of_code_and_stack() {
        for unrestricted in [true, false] {
            expect(
                &Table::of(&protected_mode(), unrestricted),
                Table::guest_error,
                &[
                    ("guest CS: access rights must say", |t| t.set(vmcs::GUEST_CS_ACCESS_RIGHTS, 0xc09au32)),
                    ("guest CS: access rights must say", |t| t.set(vmcs::GUEST_CS_ACCESS_RIGHTS, 0xc097u32)),
                    ("guest CS: the DPL of a non-conforming", |t| {
                        t.or(vmcs::GUEST_CS_ACCESS_RIGHTS, 0x20u32)
                    }),
                    ("guest CS: the DPL of a conforming", |t| t.or(vmcs::GUEST_CS_ACCESS_RIGHTS, 0x24u32)),
                    ("guest SS: access rights must say an accessed, writable", |t| {
                        t.set(vmcs::GUEST_SS_ACCESS_RIGHTS, 0xc091u32);
                    }),
                ],
            );
        }
        expect(
            &Table::of(&protected_mode(), false),
            Table::guest_error,
            &[
                ("guest CS: access rights say a writable", |t| {
                    t.set(vmcs::GUEST_CS_ACCESS_RIGHTS, 0xc093u32)
                }),
                ("guest SS: the DPL must be the selector's", |t| {
                    t.or(vmcs::GUEST_CS_ACCESS_RIGHTS, 0x20u32);
                    t.or(vmcs::GUEST_SS_ACCESS_RIGHTS, 0x20u32);
                }),
            ],
        );
        expect(
            &Table::of(&CpuState::reset(), true),
            Table::guest_error,
            &[
                ("guest CS: access rights say a writable data segment, whose", |t| {
                    t.set(vmcs::GUEST_CS_ACCESS_RIGHTS, 0xf3u32);
                }),
                ("guest SS: the DPL must be 0 in real mode", |t| {
                    t.or(vmcs::GUEST_CS_ACCESS_RIGHTS, 0x60u32);
                    t.or(vmcs::GUEST_SS_ACCESS_RIGHTS, 0x60u32);
                }),
            ],
        );
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest CS: D/B", |t| t.or(vmcs::GUEST_CS_ACCESS_RIGHTS, DEFAULT_BIG)),
                ("guest CS: the DPL of a non-conforming", |t| {
                    // The DPL of an unusable SS is still the CPL.
                    t.or(vmcs::GUEST_SS_ACCESS_RIGHTS, 0x60u32);
                }),
            ],
        );
    }

    #[test]
    fn conforming_code_may_be_more_privileged_than_its_user() {
        let mut table = Table::of(&compatibility_mode(), false);
        table.set(vmcs::GUEST_CS_ACCESS_RIGHTS, 0xc09fu32);
        assert_eq!(table.guest_error(), None);
    }

    #[test]
    fn data_segments() {
        let valid = Table::of(&protected_mode(), false);
        for n in [0, 3, 4, 5] {
            let fields = &GUEST_SEGMENTS[n];
            let rights = |words: &str, rights: u32| {
                breaks(&valid, n, words, |t| t.set(fields.access_rights, rights));
            };
            rights("access rights must say an accessed", 0xc092);
            rights("access rights say a code segment", 0xc099);
            breaks(&valid, n, "the DPL must not be below", |t| t.or(fields.selector, 1u16));
            let mut conforming = valid.clone();
            conforming.or(fields.selector, 3u16);
            conforming.set(fields.access_rights, 0xc09fu32);
            assert_eq!(conforming.guest_error(), None);
        }
        let mut unrestricted = Table::of(&protected_mode(), true);
        unrestricted.or(vmcs::GUEST_DS_SELECTOR, 3u16);
        assert_eq!(unrestricted.guest_error(), None);
    }

    #[test]
    fn what_holds_for_code_and_data() {
        let valid = Table::of(&protected_mode(), false);
        for (n, fields) in GUEST_SEGMENTS.iter().enumerate().take(LDTR) {
            breaks(&valid, n, "access rights must say a code or data", |t| {
                t.clear(fields.access_rights, CODE_OR_DATA);
            });
            breaks(&valid, n, "the segment must be present", |t| t.clear(fields.access_rights, 0x80u32));
        }
    }

    #[test]
    fn limits_and_reserved_bits() {
        let valid = Table::of(&protected_mode(), false);
        for (n, fields) in GUEST_SEGMENTS.iter().enumerate() {
            for bit in [8, 11, 17, 31] {
                breaks(&valid, n, "reserved bits", |t| t.or(fields.access_rights, 1u32 << bit));
            }
            breaks(&valid, n, "G must be 0", |t| {
                t.or(fields.access_rights, GRANULARITY);
                t.set(fields.limit, 0xfffeu32);
            });
            breaks(&valid, n, "G must be 1", |t| {
                t.clear(fields.access_rights, GRANULARITY);
                t.set(fields.limit, 0x10_0fffu32);
            });
        }
    }

    #[test]
    fn system_segments() {
        expect(
            &Table::of(&protected_mode(), false),
            Table::guest_error,
            &[
                ("guest TR: access rights must say a busy TSS", |t| {
                    t.set(vmcs::GUEST_TR_ACCESS_RIGHTS, 0x89u32)
                }),
                ("guest TR: access rights must say a system", |t| {
                    t.set(vmcs::GUEST_TR_ACCESS_RIGHTS, 0x9bu32)
                }),
                ("guest TR: the segment must be", |t| t.set(vmcs::GUEST_TR_ACCESS_RIGHTS, 0x0bu32)),
                ("guest TR: the register must be usable", |t| t.or(vmcs::GUEST_TR_ACCESS_RIGHTS, UNUSABLE)),
                ("guest LDTR: access rights must say an LDT", |t| {
                    t.set(vmcs::GUEST_LDTR_ACCESS_RIGHTS, 0x8bu32)
                }),
                ("guest LDTR: access rights must say a system", |t| {
                    t.set(vmcs::GUEST_LDTR_ACCESS_RIGHTS, 0x92u32)
                }),
                ("guest LDTR: the segment must be", |t| t.set(vmcs::GUEST_LDTR_ACCESS_RIGHTS, 2u32)),
            ],
        );
        let mut sixteen_bits = Table::of(&protected_mode(), false);
        sixteen_bits.set(vmcs::GUEST_TR_ACCESS_RIGHTS, 0x83u32);
        assert_eq!(sixteen_bits.guest_error(), None);
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[("guest TR: access rights must say a busy 64-bit", |t| {
                t.set(vmcs::GUEST_TR_ACCESS_RIGHTS, 0x83u32)
            })],
        );
    }
}
