//! A vCPU as the instruction emulator sees it: registers, memory through the guest's page tables, devices, ports.

use super::control_regs::{Change, GeneralProtection, Limits, Now, CR4_LA57};
use super::emulate::{
    Access, AccessKind, Attributes, Cpu, Fault, Gpr, KnownOperand, Mode, Seg, Segment, X87Action,
};
use super::guest::Guest;
use super::layout::{ECAM_SIZE, ECAM_START, IOAPIC_START};
use super::paging::Place;
use super::vcpu::{Activity, Core};
use crate::cpu::{random, tsc};
use crate::hw::{extended, CpuState, HwVcpu, SegmentName, Vendor};

/// Offset of the local APIC's spurious-interrupt vector register, which holds its software enable bit.
const SPURIOUS_VECTOR: u64 = 0xf0;

/// The vCPU and its VM for the length of one emulated instruction.
pub(super) struct View<'a, V: Vendor> {
    pub(super) core: &'a mut Core<V>,
    pub(super) guest: &'a Guest<V>,
    /// What the exit said about the operand that faulted.
    pub(super) known: Option<KnownOperand>,
}

/// Where the parts of an access lie: one, or two when it crosses a page.
struct Parts {
    first: Place,
    /// Bytes of the first part, and where the rest lies.
    second: Option<(u8, Place)>,
}

impl<V: Vendor> View<'_, V> {
    #[inline]
    fn place(&mut self, linear: u64, size: u8, access: Access) -> Result<Place, Fault> {
        if let Some(known) = self.known {
            if let Some(gpa) = known.translate(linear, size, access) {
                // The fault's own access found no RAM. A read may find some where a write does not.
                return Ok(if access.kind.is_write() || !known.write {
                    Place::Device(gpa)
                } else {
                    self.core.paging.place(&self.guest.memory, gpa, false)
                });
            }
        }
        let kind = match access.kind {
            AccessKind::Read => mmu::Access::at_cpl(mmu::AccessKind::Read, self.core.hw.cpl()),
            AccessKind::Write | AccessKind::ReadModify => {
                mmu::Access::at_cpl(mmu::AccessKind::Write, self.core.hw.cpl())
            }
            AccessKind::WriteAs(level) => mmu::Access::at_cpl(mmu::AccessKind::Write, level),
            AccessKind::System => mmu::Access::implicit(mmu::AccessKind::Read),
            AccessKind::SystemWrite => mmu::Access::implicit(mmu::AccessKind::Write),
        };
        let core = &mut *self.core;
        let gpa = core.paging.translate(&self.guest.memory, &core.hw, linear, kind)?;
        Ok(core.paging.place(&self.guest.memory, gpa, access.kind.is_write()))
    }

    #[inline]
    fn parts(&mut self, linear: u64, size: u8, access: Access) -> Result<Parts, Fault> {
        let room = 0x1000 - (linear & 0xfff);
        if u64::from(size) <= room {
            return Ok(Parts { first: self.place(linear, size, access)?, second: None });
        }
        let first = self.place(linear, room as u8, access)?;
        let second = self.place(linear + room, size - room as u8, access)?;
        Ok(Parts { first, second: Some((room as u8, second)) })
    }

    fn read_part(&mut self, place: Place, size: u8) -> Result<u64, Fault> {
        match place {
            Place::Ram(at) => {
                let mut bytes = [0; 8];
                self.guest
                    .memory
                    .read(self.core.paging.host_cpu(), at, &mut bytes[..usize::from(size)])
                    .map_err(|_| Fault::Retry)?;
                Ok(u64::from_le_bytes(bytes))
            }
            Place::Device(gpa) if matches!(size, 1 | 2 | 4 | 8) => {
                Ok(self.core.mmio_read(self.guest, gpa, size))
            }
            Place::Device(gpa) => Ok((0..u64::from(size))
                .fold(0, |value, at| value | self.core.mmio_read(self.guest, gpa + at, 1) << (8 * at))),
        }
    }

    fn write_part(&mut self, place: Place, size: u8, value: u64) -> Result<(), Fault> {
        match place {
            Place::Ram(at) => {
                let bytes = value.to_le_bytes();
                self.guest
                    .memory
                    .write(self.core.paging.host_cpu(), at, &bytes[..usize::from(size)])
                    .map_err(|_| Fault::Retry)?;
            }
            Place::Device(gpa) if matches!(size, 1 | 2 | 4 | 8) => {
                self.core.mmio_write(self.guest, gpa, size, value);
            }
            Place::Device(gpa) => {
                for at in 0..u64::from(size) {
                    self.core.mmio_write(self.guest, gpa + at, 1, value >> (8 * at) & 0xff);
                }
            }
        }
        Ok(())
    }
}

impl<V: Vendor> Cpu for View<'_, V> {
    #[inline]
    fn gpr(&self, gpr: Gpr) -> u64 {
        self.core.hw.gprs()[gpr as usize]
    }
    #[inline]
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        self.core.hw.gprs_mut()[gpr as usize] = value;
    }
    #[inline]
    fn rip(&self) -> u64 {
        self.core.hw.rip()
    }
    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.core.hw.set_rip(rip);
    }
    #[inline]
    fn rflags(&self) -> u64 {
        self.core.hw.rflags()
    }
    #[inline]
    fn set_rflags(&mut self, rflags: u64) {
        self.core.hw.set_rflags(rflags);
    }
    #[inline]
    fn cpl(&self) -> u8 {
        self.core.hw.cpl()
    }
    #[inline]
    fn mode(&self) -> Mode {
        self.core.mode()
    }
    #[inline]
    fn cr0(&self) -> u64 {
        self.core.hw.cr0()
    }
    #[inline]
    fn cr4(&self) -> u64 {
        self.core.hw.cr4()
    }
    #[inline]
    fn segment(&self, seg: Seg) -> Segment {
        let segment = match seg {
            Seg::Es => self.core.hw.segment(SegmentName::Es),
            Seg::Cs => self.core.hw.segment(SegmentName::Cs),
            Seg::Ss => self.core.hw.segment(SegmentName::Ss),
            Seg::Ds => self.core.hw.segment(SegmentName::Ds),
            Seg::Fs => self.core.hw.segment(SegmentName::Fs),
            Seg::Gs => self.core.hw.segment(SegmentName::Gs),
            Seg::Tr => self.core.hw.state().tr,
        };
        Segment {
            selector: segment.selector,
            attributes: Attributes(segment.attributes),
            limit: segment.limit,
            base: segment.base,
        }
    }
    #[inline]
    fn linear_bits(&self) -> u32 {
        if self.core.hw.cr4() & CR4_LA57 != 0 {
            57
        } else {
            48
        }
    }
    #[inline]
    fn clear_interrupt_shadow(&mut self) {
        self.core.hw.clear_shadow();
    }
    fn set_interrupt_shadow(&mut self) {
        self.core.hw.restore_shadow();
    }
    #[inline]
    fn interrupt_pending(&self) -> bool {
        self.core.attention || self.guest.has_mail(self.core.index)
    }

    #[inline]
    fn read(&mut self, linear: u64, size: u8, access: Access) -> Result<u64, Fault> {
        let Parts { first, second } = self.parts(linear, size, access)?;
        match second {
            None => self.read_part(first, size),
            Some((split, second)) => {
                let low = self.read_part(first, split)?;
                Ok(low | self.read_part(second, size - split)? << (8 * split))
            }
        }
    }

    #[inline]
    fn write(&mut self, linear: u64, size: u8, value: u64, access: Access) -> Result<(), Fault> {
        let Parts { first, second } = self.parts(linear, size, access)?;
        match second {
            None => self.write_part(first, size, value),
            Some((split, second)) => {
                self.write_part(first, split, value)?;
                self.write_part(second, size - split, value >> (8 * split))
            }
        }
    }

    fn probe_write(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault> {
        self.parts(linear, size, access).map(|_| ())
    }

    fn probe_read(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault> {
        self.parts(linear, size, access).map(|_| ())
    }

    fn compare_exchange(
        &mut self,
        linear: u64,
        size: u8,
        old: u128,
        new: u128,
        access: Access,
    ) -> Result<bool, Fault> {
        let Parts { first, second } = self.parts(linear, size, access)?;
        if let (Place::Ram(at), None) = (first, second.as_ref()) {
            // What cannot be done atomically here the guest does itself: RAM is not emulated for long.
            return self
                .guest
                .memory
                .compare_exchange(self.core.paging.host_cpu(), at, size, old as u64, new as u64)
                .ok_or(Fault::Retry);
        }
        // A device, or a locked access across pages: written in parts of at most eight bytes.
        self.write(linear, size.min(8), new as u64, access)?;
        if size == 16 {
            self.write(linear + 8, 8, (new >> 64) as u64, access)?;
        }
        Ok(true)
    }

    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Fault> {
        Ok(self.core.port_in(self.guest, port, size))
    }

    fn port_out(&mut self, port: u16, size: u8, value: u32) -> Result<(), Fault> {
        self.core.port_out(self.guest, port, size, value);
        Ok(())
    }

    fn tsc(&mut self) -> u64 {
        self.core.guest_tsc(self.guest, tsc::read())
    }

    fn tsc_aux(&self) -> Option<u32> {
        self.guest.cpuid.caps().tsc_aux.then_some(self.core.msrs.tsc_aux)
    }

    fn has_random(&self, seed: bool) -> bool {
        /// CPUID 1 ECX and 7 EBX (SDM vol. 2, CPUID).
        const RDRAND: u32 = 1 << 30;
        const RDSEED: u32 = 1 << 18;
        let leaf = if seed { 7 } else { 1 };
        let answer = self.guest.cpuid.lookup(leaf, 0, &self.core.cpuid_state(leaf));
        if seed {
            answer.ebx & RDSEED != 0
        } else {
            answer.ecx & RDRAND != 0
        }
    }

    fn random(&mut self, seed: bool) -> Option<u64> {
        if seed {
            random::seed()
        } else {
            random::random()
        }
    }

    fn x87(&mut self, action: X87Action) -> Option<u16> {
        Some(match action {
            X87Action::Initialize => {
                extended::x87_initialize();
                0
            }
            X87Action::ClearExceptions => {
                extended::x87_clear_exceptions();
                0
            }
            X87Action::Status => extended::x87_status(),
            X87Action::Control => extended::x87_control(),
            X87Action::LoadControl(control) => {
                extended::x87_load_control(control);
                0
            }
        })
    }

    fn xmm(&mut self, index: u8) -> Option<u128> {
        Some(extended::vector(index))
    }

    fn set_xmm(&mut self, index: u8, value: u128) -> bool {
        extended::set_vector(index, value);
        true
    }

    fn state(&self) -> CpuState {
        self.core.hw.state()
    }

    fn set_state(&mut self, state: &CpuState) {
        self.core.set_state(state);
        // What waits for the guest to open, or to leave a shadow, is looked at again.
        self.core.attention = true;
    }

    fn limits(&self) -> Limits {
        Core::<V>::control_limits(self.guest)
    }

    fn flush(&mut self) {
        self.core.invalidate_all();
    }

    fn invalidate(&mut self, linear: u64) {
        self.core.invalidate_page(self.guest, linear);
    }

    fn invalidate_context(&mut self, kind: u8, pcid: u16, linear: u64) {
        self.core.invalidate_context(kind, pcid, linear);
    }

    fn change_controls(&mut self, now: &Now, change: &Change) -> Result<(), GeneralProtection> {
        self.core.apply(self.guest, now, change)
    }

    fn read_pdptes(&mut self, cr3: u64) -> Option<[u64; 4]> {
        self.core.hw.keeps_pdptes().then(|| self.core.read_pdptes(self.guest, cr3))
    }

    fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        self.core.hw.set_pdptes(pdptes);
        // They come after the CR3 that they belong to.
        if self.core.paging.is_shadowed() {
            self.core.paging.state_replaced(&self.core.hw);
        }
    }

    fn cr8(&self) -> u8 {
        self.core.hw.cr8()
    }

    fn set_cr8(&mut self, value: u8) {
        self.core.hw.set_cr8(value);
        self.core.attention = true;
    }

    fn breakpoint(&self, index: u8) -> u64 {
        extended::breakpoint_addresses()[usize::from(index & 3)]
    }

    fn set_breakpoint(&mut self, index: u8, address: u64) {
        extended::set_breakpoint_address(index, address);
    }

    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.core.read_msr(self.guest, msr).ok()
    }

    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        self.core.write_msr(self.guest, msr, value).is_ok()
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let result = self.guest.cpuid.lookup(leaf, subleaf, &self.core.cpuid_state(leaf));
        [result.eax, result.ebx, result.ecx, result.edx]
    }

    fn xcr0(&self) -> u64 {
        self.core.extended.xcr0()
    }

    fn set_xcr0(&mut self, value: u64) -> bool {
        let valid = self.guest.cpuid.caps().xcr0_is_valid(value);
        if valid {
            self.core.extended.set_xcr0(value);
        }
        valid
    }

    fn halt(&mut self) {
        self.core.activity = Activity::Halted;
        self.core.attention = true;
    }

    fn unblock_nmi(&mut self) {
        self.core.hw.set_nmis_blocked(false);
        self.core.attention = true;
    }
}

impl<V: Vendor> Core<V> {
    /// Reads a device's memory; where there is none, all ones.
    #[inline]
    pub(super) fn mmio_read(&mut self, guest: &Guest<V>, gpa: u64, size: u8) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size));
        let page = gpa & !0xfff;
        if self.lapic.mmio_base() == Some(page) {
            self.lapic.set_cr8(self.hw.cr8());
            let now = tsc::read();
            let tsc = self.guest_tsc(guest, now);
            return self.lapic.mmio_read((gpa & 0xfff) as u32, size, guest.clock.ns(now), tsc);
        }
        match page {
            IOAPIC_START => guest.board.lock().ioapic.read((gpa & 0xfff) as u32, size),
            _ if gpa.wrapping_sub(ECAM_START) < ECAM_SIZE => {
                let ns = guest.clock.ns(tsc::read());
                guest.board.lock().chipset.mmio_read(gpa, size, ns).unwrap_or(ones)
            }
            _ => ones,
        }
    }

    /// Writes a device's memory; where there is none, nothing happens.
    #[inline]
    pub(super) fn mmio_write(&mut self, guest: &Guest<V>, gpa: u64, size: u8, value: u64) {
        let page = gpa & !0xfff;
        if self.lapic.mmio_base() == Some(page) {
            self.lapic.set_cr8(self.hw.cr8());
            let now = tsc::read();
            let tsc = self.guest_tsc(guest, now);
            let action = self.lapic.mmio_write((gpa & 0xfff) as u32, size, value, guest.clock.ns(now), tsc);
            self.hw.set_cr8(self.lapic.cr8());
            self.apic_enabled |= gpa & 0xff0 == SPURIOUS_VECTOR;
            self.attention = true;
            self.apic_action(guest, action);
        } else if page == IOAPIC_START {
            let mut board = guest.board.lock();
            guest.with_sink(&mut self.woken, |sink| {
                board.ioapic.write((gpa & 0xfff) as u32, size, value, sink);
            });
        } else if gpa.wrapping_sub(ECAM_START) < ECAM_SIZE {
            let ns = guest.clock.ns(tsc::read());
            guest.board.lock().chipset.mmio_write(gpa, size, value, ns);
        }
    }
}
