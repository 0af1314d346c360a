//! A CPU made of arrays: one stretch of RAM, one of device memory, pages that fault, ports, and a log of all of it.
use crate::hw::{CpuState, TableRegister};
use crate::vm::control_regs::{pdptes_are_valid, Change, Flush, GeneralProtection, Limits, Now};
use crate::vm::emulate::{
    Access, AccessKind, Attributes, Cpu, Emulator, Exception, Fault, Gpr, Mode, Outcome, Seg, Segment,
    X87Action,
};

/// What the emulator asked of memory and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Read { linear: u64, size: u8, access: Access },
    Write { linear: u64, size: u8, value: u64, access: Access },
    Probe { linear: u64, size: u8 },
    Exchange { linear: u64, size: u8, old: u128, new: u128 },
    In { port: u16, size: u8 },
    Out { port: u16, size: u8, value: u32 },
}

#[derive(Clone, Debug)]
pub(super) struct FakeCpu {
    pub(super) gprs: [u64; 16],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) cpl: u8,
    pub(super) mode: Mode,
    pub(super) cr0: u64,
    pub(super) tsc: u64,
    pub(super) tsc_aux: Option<u32>,
    /// What RDRAND and RDSEED find; the outer `None`: no such instructions.
    pub(super) random: Option<Option<u64>>,
    /// Control and status word of the x87 unit, if there is one.
    pub(super) x87: Option<(u16, u16)>,
    pub(super) segments: [Segment; 7],
    pub(super) ldtr: Segment,
    pub(super) gdtr: TableRegister,
    pub(super) idtr: TableRegister,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) cr8: u8,
    pub(super) efer: u64,
    pub(super) debug: [u64; 8],
    pub(super) limits: Limits,
    pub(super) pdptes: [u64; 4],
    pub(super) loaded_pdptes: Option<[u64; 4]>,
    pub(super) msrs: Vec<(u32, u64)>,
    pub(super) xcr0: u64,
    pub(super) flushes: u32,
    pub(super) halted: bool,
    pub(super) nmi_unblocked: bool,
    pub(super) linear_bits: u32,
    pub(super) shadow: bool,
    pub(super) interrupt: bool,
    pub(super) xmm: Option<[u128; 16]>,
    /// Linear address of `ram`.
    pub(super) base: u64,
    pub(super) ram: Vec<u8>,
    /// Linear range without RAM: reads give `device_value`, nothing is stored.
    pub(super) device: core::ops::Range<u64>,
    pub(super) device_value: u64,
    /// Pages (linear >> 12) that are not present.
    pub(super) absent: Vec<u64>,
    /// Pages that may not be written.
    pub(super) read_only: Vec<u64>,
    /// How many compare-exchanges another CPU disturbs.
    pub(super) disturbed: u32,
    pub(super) port_value: u32,
    /// What the n-th and later port access answers.
    pub(super) port_fault: Option<(usize, Fault)>,
    pub(super) log: Vec<Event>,
}

/// EFER.LME and EFER.LMA.
pub(super) const LONG_MODE: u64 = 0x500;
/// Where the tests' RAM lies and how long it is.
pub(super) const RAM: u64 = 0x10_0000;
pub(super) const RAM_LEN: usize = 0x4000;
/// Device memory.
pub(super) const DEVICE: u64 = 0xfee0_0000;
/// RIP of the instruction under test.
pub(super) const RIP: u64 = 0x40_0000;

impl FakeCpu {
    /// A CPU in `mode` with flat segments (64 KiB ones in the 8086 modes), at CPL 0 (3 in virtual-8086 mode).
    pub(super) fn new(mode: Mode) -> Self {
        let (limit, big) = match mode {
            Mode::Real | Mode::Vm86 => (0xffff, 0),
            Mode::Protected16 => (0xffff_ffff, 0),
            Mode::Protected32 | Mode::Long64 => (0xffff_ffff, 1 << 10),
        };
        let data = Segment { selector: 0x10, attributes: Attributes(0x93 | big), limit, base: 0 };
        let code_bits = if mode == Mode::Long64 { 1 << 9 } else { big };
        let code = Segment { selector: 8, attributes: Attributes(0x9b | code_bits), limit, base: 0 };
        let task = Segment { selector: 0x40, attributes: Attributes(0x8b), limit: 0x67, base: RAM + 0x3000 };
        let cpl = if mode == Mode::Vm86 { 3 } else { 0 };
        Self {
            gprs: [0; 16],
            rip: if matches!(mode, Mode::Real | Mode::Vm86) { 0x4000 } else { RIP },
            rflags: if mode == Mode::Vm86 { 0x2_0002 } else { 2 },
            cpl,
            mode,
            cr0: 0x11,
            tsc: 0x1122_3344_5566_7788,
            tsc_aux: Some(7),
            random: Some(None),
            x87: Some((0x40, 0)),
            segments: [data, code, data, data, data, data, task],
            ldtr: Segment { selector: 0, attributes: Attributes(0), limit: 0, base: 0 },
            gdtr: TableRegister { base: RAM, limit: 0 },
            idtr: TableRegister { base: RAM, limit: 0 },
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: if mode == Mode::Long64 { LONG_MODE } else { 0 },
            debug: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            limits: Limits { cr4: 0x7f_7fff, phys_bits: 40, amd: false },
            pdptes: [0; 4],
            loaded_pdptes: None,
            msrs: Vec::new(),
            xcr0: 1,
            flushes: 0,
            halted: false,
            nmi_unblocked: false,
            linear_bits: 48,
            shadow: true,
            interrupt: false,
            xmm: None,
            base: RAM,
            ram: vec![0; RAM_LEN],
            device: DEVICE..DEVICE + 0x1000,
            device_value: 0x8877_6655_4433_2211,
            absent: Vec::new(),
            read_only: Vec::new(),
            disturbed: 0,
            port_value: 0xa1b2_c3d4,
            port_fault: None,
            log: Vec::new(),
        }
    }

    /// A 64-bit CPU with RBX at the beginning of RAM.
    pub(super) fn long() -> Self {
        let mut cpu = Self::new(Mode::Long64);
        cpu[Gpr::Rbx] = RAM;
        cpu
    }

    pub(super) fn peek(&self, linear: u64, size: u8) -> u64 {
        let at = (linear - self.base) as usize;
        let mut bytes = [0; 8];
        bytes[..size.into()].copy_from_slice(&self.ram[at..at + usize::from(size)]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn poke(&mut self, linear: u64, size: u8, value: u64) {
        let at = (linear - self.base) as usize;
        self.ram[at..at + usize::from(size)].copy_from_slice(&value.to_le_bytes()[..size.into()]);
    }

    /// Emulates one instruction with a fresh emulator.
    pub(super) fn run(&mut self, bytes: &[u8]) -> Outcome {
        Emulator::new().unwrap().emulate(self, bytes)
    }

    /// Emulates one instruction, padded to fifteen bytes, that must complete, and checks what completion means.
    pub(super) fn done(&mut self, bytes: &[u8]) {
        let rip = self.rip;
        let mut padded = [0x90; 15];
        padded[..bytes.len()].copy_from_slice(bytes);
        assert_eq!(self.run(&padded), Outcome::Done { trap: false }, "{bytes:02x?}");
        assert_eq!(self.rip, rip + bytes.len() as u64, "{bytes:02x?}");
        assert!(!self.shadow);
    }

    /// Emulates one instruction that must raise `vector` (with error code 0, or none in real mode) and change nothing.
    pub(super) fn faults(&mut self, bytes: &[u8], vector: u8) {
        let mut before = self.clone();
        let error_code = (vector != 6 && vector != 0 && self.mode != Mode::Real).then_some(0);
        assert_eq!(
            self.run(bytes),
            Outcome::Exception(Exception { vector, error_code, cr2: None }),
            "{bytes:02x?}"
        );
        before.rflags |= 1 << 16;
        self.assert_same_state(&before);
    }

    pub(super) fn assert_same_state(&self, other: &Self) {
        assert_eq!(self.gprs, other.gprs);
        assert_eq!(self.rip, other.rip);
        assert_eq!(self.rflags, other.rflags);
        assert_eq!(self.shadow, other.shadow);
        assert!(self.ram == other.ram, "memory changed");
    }

    /// The log without who else asked: (linear, size) of reads and writes.
    pub(super) fn touched(&self) -> Vec<(char, u64, u8)> {
        self.log
            .iter()
            .filter_map(|event| match *event {
                Event::Read { linear, size, .. } => Some(('r', linear, size)),
                Event::Write { linear, size, .. } => Some(('w', linear, size)),
                Event::Exchange { linear, size, .. } => Some(('x', linear, size)),
                _ => None,
            })
            .collect()
    }

    fn check(&self, linear: u64, size: u8, kind: AccessKind) -> Result<(), Fault> {
        let end = linear.checked_add(u64::from(size) - 1).expect("the emulator passes no range that wraps");
        let system = kind.is_system() && self.efer & LONG_MODE != 0;
        let inward = matches!(kind, AccessKind::WriteAs(_)) && self.efer & LONG_MODE != 0;
        assert!(self.mode == Mode::Long64 || system || inward || end < 1 << 32, "range beyond 4 GiB");
        let level = match kind {
            AccessKind::WriteAs(level) => level,
            AccessKind::System | AccessKind::SystemWrite => 0,
            _ => self.cpl,
        };
        let user = if level == 3 { 4 } else { 0 };
        for page in [linear >> 12, end >> 12] {
            let at = linear.max(page << 12);
            let error = user | if kind.is_write() { 2 } else { 0 };
            if self.absent.contains(&page) {
                return Err(Exception::page_fault(error, at).into());
            }
            if kind.is_write() && self.read_only.contains(&page) {
                return Err(Exception::page_fault(error | 1, at).into());
            }
        }
        Ok(())
    }

    /// Offset of a range in `ram`; `None`: device or nothing.
    fn ram_at(&self, linear: u64, size: u8) -> Option<core::ops::Range<usize>> {
        let start = usize::try_from(linear.checked_sub(self.base)?).ok()?;
        let end = start.checked_add(size.into())?;
        (end <= self.ram.len()).then_some(start..end)
    }

    fn ports(&self) -> usize {
        self.log.iter().filter(|e| matches!(e, Event::In { .. } | Event::Out { .. })).count()
    }

    fn port_answer(&self) -> Result<(), Fault> {
        match self.port_fault {
            Some((from, fault)) if self.ports() > from => Err(fault),
            _ => Ok(()),
        }
    }
}

impl core::ops::Index<Gpr> for FakeCpu {
    type Output = u64;
    fn index(&self, gpr: Gpr) -> &u64 {
        &self.gprs[gpr as usize]
    }
}

impl core::ops::IndexMut<Gpr> for FakeCpu {
    fn index_mut(&mut self, gpr: Gpr) -> &mut u64 {
        &mut self.gprs[gpr as usize]
    }
}

impl Cpu for FakeCpu {
    fn gpr(&self, gpr: Gpr) -> u64 {
        self[gpr]
    }
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        self[gpr] = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, rip: u64) {
        self.rip = rip;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        let reserved = 0xffff_ffff_ffc0_802a;
        let changed = self.rflags ^ rflags;
        assert_eq!(changed & (reserved | crate::vm::emulate::flags::VM), 0, "VM and reserved bits stay");
        self.rflags = rflags;
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn mode(&self) -> Mode {
        self.mode
    }
    fn cr0(&self) -> u64 {
        self.cr0
    }
    fn cr4(&self) -> u64 {
        self.cr4
    }
    fn segment(&self, seg: Seg) -> Segment {
        self.segments[seg as usize]
    }
    fn linear_bits(&self) -> u32 {
        self.linear_bits
    }
    fn clear_interrupt_shadow(&mut self) {
        self.shadow = false;
    }
    fn set_interrupt_shadow(&mut self) {
        self.shadow = true;
    }
    fn interrupt_pending(&self) -> bool {
        self.interrupt
    }

    fn read(&mut self, linear: u64, size: u8, access: Access) -> Result<u64, Fault> {
        assert!(matches!(size, 1 | 2 | 4 | 8));
        self.check(linear, size, access.kind)?;
        self.log.push(Event::Read { linear, size, access });
        let mut bytes = self.device_value.to_le_bytes();
        if let Some(range) = self.ram_at(linear, size) {
            bytes = [0; 8];
            bytes[..size.into()].copy_from_slice(&self.ram[range]);
        }
        Ok(u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * u32::from(size))))
    }

    fn write(&mut self, linear: u64, size: u8, value: u64, access: Access) -> Result<(), Fault> {
        assert!(matches!(size, 1 | 2 | 4 | 8));
        assert!(access.kind.is_write() && access.kind != AccessKind::ReadModify);
        self.check(linear, size, access.kind)?;
        self.log.push(Event::Write { linear, size, value, access });
        if let Some(range) = self.ram_at(linear, size) {
            self.ram[range].copy_from_slice(&value.to_le_bytes()[..size.into()]);
        }
        Ok(())
    }

    fn probe_write(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault> {
        self.check(linear, size, access.kind)?;
        self.log.push(Event::Probe { linear, size });
        Ok(())
    }

    fn probe_read(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault> {
        assert_eq!(access.kind, AccessKind::Read);
        self.check(linear, size, access.kind)?;
        self.log.push(Event::Probe { linear, size });
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        linear: u64,
        size: u8,
        old: u128,
        new: u128,
        access: Access,
    ) -> Result<bool, Fault> {
        assert!(matches!(size, 1 | 2 | 4 | 8 | 16));
        self.check(linear, size, access.kind)?;
        self.log.push(Event::Exchange { linear, size, old, new });
        if self.disturbed > 0 {
            self.disturbed -= 1;
            if let Some(range) = self.ram_at(linear, size) {
                self.ram[range.start] = self.ram[range.start].wrapping_add(1);
            }
            return Ok(false);
        }
        let Some(range) = self.ram_at(linear, size) else { return Ok(true) };
        let cell = &mut self.ram[range];
        if *cell != old.to_le_bytes()[..size.into()] {
            return Ok(false);
        }
        cell.copy_from_slice(&new.to_le_bytes()[..size.into()]);
        Ok(true)
    }

    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Fault> {
        assert!(matches!(size, 1 | 2 | 4));
        self.log.push(Event::In { port, size });
        self.port_answer()?;
        Ok(self.port_value)
    }

    fn port_out(&mut self, port: u16, size: u8, value: u32) -> Result<(), Fault> {
        assert!(matches!(size, 1 | 2 | 4));
        assert_eq!(u64::from(value) >> (8 * size), 0, "value wider than the port access");
        self.log.push(Event::Out { port, size, value });
        self.port_answer()
    }

    fn tsc(&mut self) -> u64 {
        self.tsc
    }
    fn tsc_aux(&self) -> Option<u32> {
        self.tsc_aux
    }
    fn has_random(&self, _: bool) -> bool {
        self.random.is_some()
    }
    fn random(&mut self, seed: bool) -> Option<u64> {
        self.random.flatten().map(|number| if seed { !number } else { number })
    }
    fn x87(&mut self, action: X87Action) -> Option<u16> {
        let (control, status) = self.x87.as_mut()?;
        Some(match action {
            X87Action::Initialize => {
                (*control, *status) = (0x37f, 0);
                0
            }
            X87Action::ClearExceptions => {
                *status &= 0x7f00;
                0
            }
            X87Action::Status => *status,
            X87Action::Control => *control,
            X87Action::LoadControl(value) => {
                *control = value;
                0
            }
        })
    }

    fn xmm(&mut self, index: u8) -> Option<u128> {
        self.xmm.map(|xmm| xmm[usize::from(index)])
    }

    fn set_xmm(&mut self, index: u8, value: u128) -> bool {
        let Some(xmm) = &mut self.xmm else { return false };
        xmm[usize::from(index)] = value;
        true
    }

    fn state(&self) -> CpuState {
        let hidden = |segment: Segment| crate::hw::Segment {
            selector: segment.selector,
            attributes: segment.attributes.0,
            limit: segment.limit,
            base: segment.base,
        };
        let [es, cs, ss, ds, fs, gs, tr] = self.segments.map(hidden);
        let stack = crate::hw::Segment { attributes: ss.attributes & !0x60 | u16::from(self.cpl) << 5, ..ss };
        CpuState {
            segments: [es, cs, stack, ds, fs, gs],
            ldtr: hidden(self.ldtr),
            tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: if self.mode == Mode::Real { self.cr0 & !1 } else { self.cr0 | 1 },
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            dr6: self.debug[6],
            dr7: self.debug[7],
            rflags: self.rflags,
            rip: self.rip,
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        let shown = |segment: crate::hw::Segment| Segment {
            selector: segment.selector,
            attributes: Attributes(segment.attributes),
            limit: segment.limit,
            base: segment.base,
        };
        assert_eq!((self.efer ^ state.efer) & !0x400, 0, "only LMA changes");
        let [es, cs, ss, ds, fs, gs] = state.segments.map(shown);
        self.segments = [es, cs, ss, ds, fs, gs, shown(state.tr)];
        self.ldtr = shown(state.ldtr);
        (self.gdtr, self.idtr) = (state.gdtr, state.idtr);
        (self.cr0, self.cr2, self.cr3, self.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        (self.efer, self.rflags, self.rip) = (state.efer, state.rflags, state.rip);
        (self.debug[6], self.debug[7]) = (state.dr6, state.dr7);
        self.mode = Mode::of(self.cr0, self.efer, self.rflags, cs.attributes);
        self.cpl = if self.mode == Mode::Real { 0 } else { (state.segments[2].attributes >> 5 & 3) as u8 };
        assert!(self.mode != Mode::Vm86 || self.cpl == 3, "virtual-8086 mode runs at level 3");
    }

    fn limits(&self) -> Limits {
        self.limits
    }
    fn flush(&mut self) {
        self.flushes += 1;
    }
    fn change_controls(&mut self, now: &Now, change: &Change) -> Result<(), GeneralProtection> {
        let mut state = self.state();
        assert_eq!(*now, Now::from(&state));
        if change.load_pdptes {
            if !pdptes_are_valid(&self.pdptes, self.limits.phys_bits) {
                return Err(GeneralProtection);
            }
            self.set_pdptes(self.pdptes);
        }
        (state.cr0, state.cr3, state.cr4, state.efer) = (change.cr0, change.cr3, change.cr4, change.efer);
        self.set_state(&state);
        self.flushes += u32::from(change.flush != Flush::None);
        Ok(())
    }
    fn read_pdptes(&mut self, _: u64) -> Option<[u64; 4]> {
        Some(self.pdptes)
    }
    fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        self.loaded_pdptes = Some(pdptes);
    }
    fn cr8(&self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn breakpoint(&self, index: u8) -> u64 {
        assert!(index < 4);
        self.debug[usize::from(index)]
    }
    fn set_breakpoint(&mut self, index: u8, address: u64) {
        assert!(index < 4);
        self.debug[usize::from(index)] = address;
    }
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.msrs.iter().find(|(known, _)| *known == msr).map(|(_, value)| *value)
    }
    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        match self.msrs.iter_mut().find(|(known, _)| *known == msr) {
            Some(known) => known.1 = value,
            None => return false,
        }
        true
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, if leaf == 7 { 1 << 10 } else { 0xb }, subleaf, 0xd]
    }
    fn xcr0(&self) -> u64 {
        self.xcr0
    }
    fn set_xcr0(&mut self, value: u64) -> bool {
        if value & 1 == 0 {
            return false;
        }
        self.xcr0 = value;
        true
    }
    fn halt(&mut self) {
        self.halted = true;
    }
    fn unblock_nmi(&mut self) {
        self.nmi_unblocked = true;
    }
}
