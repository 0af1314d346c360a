//! VMCSs of guests in each mode that pass every rule, to be broken by tests.
use super::{GuestState, Settings};
use crate::hw::vmx::capabilities::{cr0_for_hardware, cr4_for_hardware, samples, VmxCapabilities};
use crate::hw::vmx::choice::{Controls, Mode};
use crate::hw::vmx::controls::{Activity, EntryControls, Interruptibility, Secondary};
use crate::hw::vmx::vmcs::{self, Field, Fields, Width, GUEST_SEGMENTS};
use crate::hw::{CpuState, Segment, SegmentName};
use std::collections::BTreeMap;

/// A VMCS. Reading a field that nobody wrote panics: it might not exist.
#[derive(Clone)]
pub(super) struct Table(BTreeMap<u32, u64>);

impl Fields for Table {
    fn read<W: Width>(&self, field: Field<W>) -> W::Value {
        match self.0.get(&field.encoding()) {
            Some(&value) => W::truncate(value),
            None => panic!("field {:#x} was read, which the controls do not use", field.encoding()),
        }
    }
}

/// A CPU with nearly every control, so that the rules for all can be broken.
pub(super) fn capabilities() -> VmxCapabilities {
    let mut this = samples::cpu(&samples::SKYLAKE);
    this.pin |= 0xff << 32;
    this.primary |= 0xffff_fffe << 32;
    this.secondary |= 0xdfff_ffff << 32;
    this.exit |= 0x7fff_ffff << 32;
    this.entry |= 0x007f_ffff << 32;
    this.cr4_fixed1 |= super::CR4_CET;
    this
}

/// A guest in protected mode without paging's finer points.
pub(super) fn protected_mode() -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = 0x8000_0011;
    state.segments = [Segment { selector: 0x10, attributes: 0xc93, limit: u32::MAX, base: 0 }; 6];
    state.segments[SegmentName::Cs as usize] =
        Segment { selector: 8, attributes: 0xc9b, limit: u32::MAX, base: 0 };
    state.rip = 0x10_0000;
    state
}

pub(super) fn pae() -> CpuState {
    CpuState { cr4: 0x20, ..protected_mode() }
}

pub(super) fn long_mode() -> CpuState {
    let mut state = pae();
    state.efer = 0xd00;
    state.rip = 0xffff_ffff_8100_0000;
    state.segments[SegmentName::Cs as usize].attributes = 0xa9b;
    state.segments[SegmentName::Ss as usize] = Segment::default();
    state
}

/// A program of user mode in compatibility mode.
pub(super) fn compatibility_mode() -> CpuState {
    let mut state = long_mode();
    state.rip = 0x40_0000;
    state.segments = [Segment { selector: 0x2b, attributes: 0xcf3, limit: u32::MAX, base: 0 }; 6];
    let cs = &mut state.segments[SegmentName::Cs as usize];
    (cs.selector, cs.attributes) = (0x23, 0xcfb);
    state
}

pub(super) fn virtual_8086() -> CpuState {
    let mut state = protected_mode();
    state.rflags = 0x2_3202;
    state.rip = 0x100;
    for (n, segment) in state.segments.iter_mut().enumerate() {
        *segment = Segment::real_mode(0x1000 + n as u16, 0xf3);
    }
    state
}

impl Table {
    pub(super) fn long_mode() -> Self {
        Self::of(&long_mode(), true)
    }

    /// A VMCS with which a guest in `state` can be entered.
    pub(super) fn of(state: &CpuState, unrestricted: bool) -> Self {
        let capabilities = capabilities();
        let mode = if unrestricted { Mode::Unrestricted } else { Mode::Restricted };
        let controls = Controls::choose(&capabilities, mode).unwrap();
        let mut table = Self(BTreeMap::new());
        table.set_controls(&controls);
        table.set_host();
        for (fields, segment) in
            GUEST_SEGMENTS.iter().zip(state.segments.iter().chain([&state.ldtr, &state.tr]))
        {
            table.set(fields.selector, segment.selector);
            table.set(fields.base, segment.base);
            table.set(fields.limit, segment.limit);
            table.set(fields.access_rights, crate::hw::vmx::access_rights::to_access_rights(segment));
        }
        if state.efer & super::EFER_LMA != 0 {
            table.or(vmcs::ENTRY_CONTROLS, EntryControls::IA32E_GUEST.bits());
        }
        for (field, value) in [
            (vmcs::GUEST_CR0, cr0_for_hardware(state.cr0, &capabilities, unrestricted)),
            (vmcs::GUEST_CR3, state.cr3),
            (vmcs::GUEST_CR4, cr4_for_hardware(state.cr4, &capabilities)),
            (vmcs::GUEST_GDTR_BASE, state.gdtr.base),
            (vmcs::GUEST_IDTR_BASE, state.idtr.base),
            (vmcs::GUEST_DR7, state.dr7),
            (vmcs::GUEST_RIP, state.rip),
            (vmcs::GUEST_RFLAGS, state.rflags),
            (vmcs::GUEST_SYSENTER_ESP, 0),
            (vmcs::GUEST_SYSENTER_EIP, 0),
            (vmcs::GUEST_PENDING_DEBUG, 0),
        ] {
            table.set(field, value);
        }
        table.set(vmcs::GUEST_GDTR_LIMIT, state.gdtr.limit);
        table.set(vmcs::GUEST_IDTR_LIMIT, state.idtr.limit);
        table.set(vmcs::GUEST_DEBUGCTL, 0u64);
        table.set(vmcs::GUEST_PAT, PAT);
        table.set(vmcs::GUEST_EFER, state.efer);
        table.set(vmcs::GUEST_ACTIVITY, 0u32);
        table.set(vmcs::GUEST_INTERRUPTIBILITY, 0u32);
        table.set(vmcs::VMCS_LINK_POINTER, u64::MAX);
        for field in [vmcs::GUEST_PDPTE_0, vmcs::GUEST_PDPTE_1, vmcs::GUEST_PDPTE_2, vmcs::GUEST_PDPTE_3] {
            table.set(field, 0x5001u64);
        }
        table
    }

    fn set_controls(&mut self, controls: &Controls) {
        self.set(vmcs::PIN_CONTROLS, controls.pin.bits());
        self.set(vmcs::PRIMARY_CONTROLS, controls.primary.bits());
        self.set(vmcs::SECONDARY_CONTROLS, controls.secondary.bits());
        self.set(vmcs::EXIT_CONTROLS, controls.exit.bits());
        self.set(vmcs::ENTRY_CONTROLS, controls.entry.bits());
        self.set(vmcs::VPID, 1u16);
        self.set(vmcs::MSR_BITMAPS, 0x2000u64);
        self.set(vmcs::VIRTUAL_APIC_ADDRESS, 0x3000u64);
        self.set(vmcs::EPT_POINTER, 0x401eu64);
        for field in [
            vmcs::CR3_TARGET_COUNT,
            vmcs::TPR_THRESHOLD,
            vmcs::EXIT_MSR_STORE_COUNT,
            vmcs::EXIT_MSR_LOAD_COUNT,
            vmcs::ENTRY_MSR_LOAD_COUNT,
            vmcs::ENTRY_INTERRUPTION,
        ] {
            self.set(field, 0u32);
        }
        for field in [vmcs::EXIT_MSR_STORE_ADDRESS, vmcs::EXIT_MSR_LOAD_ADDRESS, vmcs::ENTRY_MSR_LOAD_ADDRESS]
        {
            self.set(field, 0u64);
        }
    }

    fn set_host(&mut self) {
        for (field, value) in [
            (vmcs::HOST_CR0, 0x8001_0033),
            (vmcs::HOST_CR3, 0x1000),
            (vmcs::HOST_CR4, 0x2020),
            (vmcs::HOST_FS_BASE, 0),
            (vmcs::HOST_GS_BASE, 0x10_0000),
            (vmcs::HOST_TR_BASE, 0x10_1000),
            (vmcs::HOST_GDTR_BASE, 0x10_2000),
            (vmcs::HOST_IDTR_BASE, 0x10_3000),
            (vmcs::HOST_SYSENTER_ESP, 0),
            (vmcs::HOST_SYSENTER_EIP, 0),
            (vmcs::HOST_RIP, 0x10_4000u64),
        ] {
            self.set(field, value);
        }
        for (field, value) in [
            (vmcs::HOST_CS_SELECTOR, 8u16),
            (vmcs::HOST_SS_SELECTOR, 0x10),
            (vmcs::HOST_DS_SELECTOR, 0),
            (vmcs::HOST_ES_SELECTOR, 0),
            (vmcs::HOST_FS_SELECTOR, 0),
            (vmcs::HOST_GS_SELECTOR, 0),
            (vmcs::HOST_TR_SELECTOR, 0x28),
        ] {
            self.set(field, value);
        }
        self.set(vmcs::HOST_PAT, PAT);
        self.set(vmcs::HOST_EFER, 0xd01u64);
    }

    /// Writes a field.
    pub(super) fn set<W: Width>(&mut self, field: Field<W>, value: impl Into<u64>) {
        self.0.insert(field.encoding(), value.into());
    }

    /// Sets bits of a field.
    pub(super) fn or<W: Width>(&mut self, field: Field<W>, bits: impl Into<u64>) {
        let value = self.read(field).into() | bits.into();
        self.set(field, value);
    }

    /// Clears bits of a field.
    pub(super) fn clear<W: Width>(&mut self, field: Field<W>, bits: impl Into<u64>) {
        let value = self.read(field).into() & !bits.into();
        self.set(field, value);
    }

    /// Sets secondary controls.
    pub(super) fn secondary(&mut self, set: Secondary) {
        self.or(vmcs::SECONDARY_CONTROLS, set.bits());
    }

    /// Clears EPT and what the sample has that needs it.
    pub(super) fn without_ept(&mut self) {
        let gone = Secondary::EPT | Secondary::UNRESTRICTED_GUEST | Secondary::MODE_BASED_EXECUTE;
        self.clear(vmcs::SECONDARY_CONTROLS, gone.bits());
    }

    pub(super) fn settings(&self) -> Settings {
        Settings::read(self)
    }

    /// The guest's first broken rule.
    pub(super) fn guest_error(&self) -> Option<&'static str> {
        let settings = self.settings();
        let unrestricted = settings.secondary.contains(Secondary::UNRESTRICTED_GUEST);
        super::guest_state_error(&GuestState::read(self, &settings), &capabilities(), unrestricted)
    }
}

const PAT: u64 = 0x0007_0406_0007_0406;

/// A rule's words, or their start, and how to break it.
pub(super) type Broken = (&'static str, fn(&mut Table));

/// Breaks each rule in a valid table, and expects its words.
pub(super) fn expect(valid: &Table, error: impl Fn(&Table) -> Option<&'static str>, rules: &[Broken]) {
    assert_eq!(error(valid), None);
    for (words, change) in rules {
        let mut table = valid.clone();
        change(&mut table);
        let said = error(&table).unwrap_or("nothing");
        assert!(said.starts_with(words), "wanted {words:?}, was {said:?}");
    }
}

/// The first broken rule of a guest's own state.
pub(super) fn plain_error(state: &CpuState, unrestricted: bool) -> Option<&'static str> {
    let capabilities = capabilities();
    let plain = GuestState::of_guest(state, &capabilities, Interruptibility::empty(), Activity::Active);
    super::guest_state_error(&plain, &capabilities, unrestricted)
}
