//! Segment descriptors: fetching, checking and loading them. Intel SDM vol. 3, 3.4, 3.5, 5.5 to 5.8; AMD APM vol. 2,
//! 4.7 to 4.11.
use super::change::{Change, GP, NP, SS};
use super::cpu::{Cpu, Fault, Mode};
use super::flags::mask;
use crate::hw::{Segment, SegmentName};

/// A descriptor as it stands in the GDT, LDT or IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// The first eight bytes.
    pub(super) low: u64,
    /// The second eight bytes of a system descriptor in long mode, else 0.
    pub(super) high: u64,
    /// Where it stands.
    pub(super) linear: u64,
}

/// Types of system descriptors.
pub(super) mod system_type {
    pub(in super::super) const TSS_16: u8 = 1;
    pub(in super::super) const LDT: u8 = 2;
    pub(in super::super) const BUSY_TSS_16: u8 = 3;
    pub(in super::super) const CALL_GATE_16: u8 = 4;
    pub(in super::super) const TASK_GATE: u8 = 5;
    pub(in super::super) const INTERRUPT_GATE_16: u8 = 6;
    pub(in super::super) const TRAP_GATE_16: u8 = 7;
    pub(in super::super) const TSS: u8 = 9;
    pub(in super::super) const BUSY_TSS: u8 = 0xb;
    pub(in super::super) const CALL_GATE: u8 = 0xc;
    pub(in super::super) const INTERRUPT_GATE: u8 = 0xe;
    pub(in super::super) const TRAP_GATE: u8 = 0xf;
}

/// Accessed, in a type.
pub(super) const ACCESSED: u8 = 1;
/// Busy, in the type of a TSS.
pub(super) const BUSY: u8 = 2;

impl Descriptor {
    /// Bits 3:0 of the type.
    pub(super) fn kind(&self) -> u8 {
        (self.low >> 40 & 0xf) as u8
    }
    /// S: a code or data segment.
    pub(super) fn is_segment(&self) -> bool {
        self.low >> 44 & 1 != 0
    }
    /// A code segment.
    pub(super) fn is_code(&self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }
    /// A conforming code segment.
    pub(super) fn is_conforming(&self) -> bool {
        self.is_segment() && self.kind() & 0xc == 0xc
    }
    /// A data segment, or a code segment that may be read.
    pub(super) fn is_readable(&self) -> bool {
        self.is_segment() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    /// A writable data segment.
    pub(super) fn is_writable(&self) -> bool {
        self.is_segment() && self.kind() & 0xa == 2
    }
    /// A system descriptor of this type.
    pub(super) fn is_system(&self, kind: u8) -> bool {
        !self.is_segment() && self.kind() == kind
    }
    /// Descriptor privilege level.
    pub(super) fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    /// P.
    pub(super) fn is_present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
    /// Code that runs in 64-bit mode, if the CPU is in long mode.
    pub(super) fn is_long(&self) -> bool {
        self.attributes() & Segment::LONG != 0
    }
    /// Attributes in the packed form of [`Segment`].
    pub(super) fn attributes(&self) -> u16 {
        ((self.low >> 40 & 0xff) | (self.low >> 52 & 0xf) << 8) as u16
    }
    /// Limit in bytes.
    pub(super) fn limit(&self) -> u32 {
        let limit = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.low >> 55 & 1 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }
    /// Base address.
    pub(super) fn base(&self) -> u64 {
        self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000 | self.high << 32
    }
    /// What a segment register holds once it is loaded with it.
    pub(super) fn segment(&self, selector: u16) -> Segment {
        let accessed = if self.is_segment() { u16::from(ACCESSED) } else { 0 };
        let attributes = self.attributes() | accessed;
        Segment { selector, attributes, limit: self.limit(), base: self.base() }
    }

    /// Selector in a gate.
    pub(super) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Offset in a gate; that of a 16-bit gate has 16 bits.
    pub(super) fn gate_offset(&self) -> u64 {
        let low = self.low & 0xffff;
        if self.kind() & 8 == 0 {
            low
        } else {
            low | self.low >> 32 & 0xffff_0000 | self.high << 32
        }
    }
    /// Bytes of what a gate makes the processor push outside long mode.
    pub(super) fn gate_size(&self) -> u8 {
        if self.kind() & 8 == 0 {
            2
        } else {
            4
        }
    }
}

/// Whether `selector` is null.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Requested privilege level.
pub(super) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl<C: Cpu> Change<'_, C> {
    /// Where the descriptor of `selector` stands, if all of its `size` bytes are inside its table.
    fn descriptor_address(&self, selector: u16, size: u8) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else if self.state.ldtr.attributes & 0x80 != 0 {
            (self.state.ldtr.base, u64::from(self.state.ldtr.limit))
        } else {
            return None;
        };
        if offset + u64::from(size) - 1 > limit {
            return None;
        }
        self.table_address(base, offset, size)
    }

    /// The descriptor of `selector`; `None` beyond its table's limit.
    pub(super) fn try_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        let Some(linear) = self.descriptor_address(selector, 8) else { return Ok(None) };
        Ok(Some(Descriptor { low: self.read_system(linear, 8)?, high: 0, linear }))
    }

    /// The descriptor of `selector`, which is not null; beyond its table's limit, exception `invalid`.
    pub(super) fn descriptor(&mut self, selector: u16, invalid: u8) -> Result<Descriptor, Fault> {
        self.try_descriptor(selector)?.ok_or_else(|| self.selector_fault(invalid, selector))
    }

    /// Completes a system descriptor, which in long mode has sixteen bytes (SDM vol. 3, 7.2.3 and 5.8.3.1).
    pub(super) fn widen(
        &mut self,
        descriptor: Descriptor,
        selector: u16,
        invalid: u8,
    ) -> Result<Descriptor, Fault> {
        const UPPER_TYPE: u64 = 0x1f << 8;
        if !self.long_mode() {
            return Ok(descriptor);
        }
        let Some(linear) = self.descriptor_address(selector, 16) else {
            return Err(self.selector_fault(invalid, selector));
        };
        let upper = self.read_system(linear + 8, 8)?;
        // Where another descriptor's type would be there are zeros.
        if upper >> 32 & UPPER_TYPE != 0 {
            return Err(self.selector_fault(invalid, selector));
        }
        Ok(Descriptor { high: upper & mask(4), ..descriptor })
    }

    /// Loads a segment register by an instruction that names it.
    pub(super) fn load_segment(&mut self, name: SegmentName, selector: u16) -> Result<(), Fault> {
        if self.is_8086() {
            self.load_8086_segment(name, selector);
            return Ok(());
        }
        if name == SegmentName::Ss {
            let null = self.mode == Mode::Long64 && self.cpl < 3;
            self.load_stack_segment(selector, self.cpl, GP, null)
        } else {
            self.load_data_segment(name, selector, self.cpl, GP)
        }
    }

    /// Loads a segment register in real or virtual-8086 mode. SDM vol. 3, 21.1.1 and 21.2.
    pub(super) fn load_8086_segment(&mut self, name: SegmentName, selector: u16) {
        if self.mode == Mode::Vm86 {
            *self.segment_mut(name) = Segment::real_mode(selector, 0xf3);
            return;
        }
        // Limit and D/B stay what protected mode left; a segment that it left unusable becomes an ordinary one.
        let segment = self.segment_mut(name);
        let usable = segment.attributes & 0x80 != 0;
        let kind = if name == SegmentName::Cs { 0x9b } else { 0x93 };
        let kept = segment.attributes & 0xf00 & !Segment::LONG;
        segment.attributes = if usable { kind | kept } else { kind };
        segment.limit = if usable { segment.limit } else { 0xffff };
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
    }

    /// Loads DS, ES, FS or GS at privilege level `cpl`. `invalid` is #GP, or #TS in a task switch.
    pub(super) fn load_data_segment(
        &mut self,
        name: SegmentName,
        selector: u16,
        cpl: u8,
        invalid: u8,
    ) -> Result<(), Fault> {
        if is_null(selector) {
            self.unload_segment(name, selector);
            return Ok(());
        }
        let descriptor = self.descriptor(selector, invalid)?;
        let privileged = descriptor.is_conforming() || descriptor.dpl() >= cpl.max(rpl(selector));
        if !descriptor.is_readable() || !privileged {
            return Err(self.selector_fault(invalid, selector));
        }
        if !descriptor.is_present() {
            return Err(self.selector_fault(NP, selector));
        }
        self.mark(&descriptor, ACCESSED)?;
        *self.segment_mut(name) = descriptor.segment(selector);
        Ok(())
    }

    /// Makes DS, ES, FS or GS unusable. AMD's processors keep base and limit.
    pub(super) fn unload_segment(&mut self, name: SegmentName, selector: u16) {
        let amd = self.cpu.limits().amd;
        let segment = self.segment_mut(name);
        *segment = if amd {
            Segment { selector, attributes: 0, ..*segment }
        } else {
            Segment { selector, ..Segment::default() }
        };
    }

    /// Loads SS for code at privilege level `cpl`. `invalid` is #GP or #TS, `null` whether a null selector will do.
    pub(super) fn load_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        invalid: u8,
        null: bool,
    ) -> Result<(), Fault> {
        if is_null(selector) {
            if !null || rpl(selector) != cpl {
                return Err(self.fault(invalid, 0));
            }
            self.set_null_stack(selector, cpl);
            return Ok(());
        }
        let descriptor = self.descriptor(selector, invalid)?;
        if rpl(selector) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable() {
            return Err(self.selector_fault(invalid, selector));
        }
        if !descriptor.is_present() {
            return Err(self.selector_fault(SS, selector));
        }
        self.mark(&descriptor, ACCESSED)?;
        *self.segment_mut(SegmentName::Ss) = descriptor.segment(selector);
        Ok(())
    }

    /// A null SS, whose DPL still is the privilege level.
    pub(super) fn set_null_stack(&mut self, selector: u16, cpl: u8) {
        *self.segment_mut(SegmentName::Ss) =
            Segment { selector, attributes: u16::from(cpl) << 5, ..Segment::default() };
    }

    /// Loads CS with a checked code segment for privilege level `cpl`, and RIP with `offset`, if it may lie there.
    pub(super) fn load_code(
        &mut self,
        selector: u16,
        descriptor: &Descriptor,
        cpl: u8,
        offset: u64,
    ) -> Result<(), Fault> {
        let valid = if self.long_mode() && descriptor.is_long() {
            self.canonical(offset)
        } else {
            offset <= u64::from(descriptor.limit())
        };
        if !valid {
            return Err(self.fault(GP, 0));
        }
        self.mark(descriptor, ACCESSED)?;
        *self.segment_mut(SegmentName::Cs) = descriptor.segment(selector & !3 | u16::from(cpl));
        self.state.rip = offset;
        Ok(())
    }

    /// Whether the descriptor has both L and D in long mode, which no code may.
    pub(super) fn is_contradictory(&self, descriptor: &Descriptor) -> bool {
        const BOTH: u16 = Segment::LONG | Segment::DEFAULT_32;
        self.long_mode() && descriptor.attributes() & BOTH == BOTH
    }

    /// On the way to the outer level `cpl`: data segments that code there may not use become null. SDM vol. 3, 5.8.6.
    pub(super) fn drop_inner_segments(&mut self, cpl: u8) {
        for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
            let attributes = self.segment(name).attributes;
            let conforming = attributes & 0x1c == 0x1c;
            let dpl = (attributes >> 5 & 3) as u8;
            if attributes & 0x80 != 0 && !conforming && dpl < cpl {
                self.unload_segment(name, 0);
            }
        }
    }
}
