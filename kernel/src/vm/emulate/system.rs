//! System instructions: segment and table registers, control and debug registers, MSRs, system calls, the rest.
//! Intel SDM vol. 2 and vol. 3, 2.8 and 5.8.7; AMD APM vol. 3, chapter 4.
use super::change::{Change, GP, NP};
use super::cpu::{AccessKind, Cpu, Exception, Fault, Mode};
use super::decode::{DecodedInsn, Gpr, Operand, Seg, System};
use super::execute::{Execution, Flow};
use super::far::arrive;
use super::flags::{self, mask, DEFINED, IF, RF, TF, VM, ZF};
use super::segment::{is_null, rpl, system_type, Descriptor, BUSY};
use super::Outcome;
use crate::hw::{Segment, SegmentName, TableRegister};
use crate::vm::control_regs::{self, GeneralProtection, Now};
use crate::vm::control_regs::{CR0_PE, CR4_DE, CR4_OSXSAVE, CR4_PCIDE, CR4_UMIP};

const MSR_SYSENTER_CS: u32 = 0x174;
const MSR_SYSENTER_ESP: u32 = 0x175;
const MSR_SYSENTER_EIP: u32 = 0x176;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_CSTAR: u32 = 0xc000_0083;
const MSR_SFMASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// EFER: SYSCALL is enabled.
const EFER_SCE: u64 = 1 << 0;
/// DR6: a debug register was accessed under DR7.GD.
const DR6_BD: u64 = 1 << 13;
const DR6_WRITABLE: u64 = 0xe00f;
const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7: debug registers are guarded.
const DR7_GD: u64 = 1 << 13;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_FIXED: u64 = 0x400;
const DB: Exception = Exception { vector: 1, error_code: None, cr2: None };

/// Flat 4 GiB segments as the system calls load them.
const FLAT_CODE: u16 = 0xc9b;
const FLAT_CODE_64: u16 = 0xa9b;
const FLAT_DATA: u16 = 0xc93;

/// The segment register that an operand names.
fn name(seg: Seg) -> Option<SegmentName> {
    Some(match seg {
        Seg::Es => SegmentName::Es,
        Seg::Cs => SegmentName::Cs,
        Seg::Ss => SegmentName::Ss,
        Seg::Ds => SegmentName::Ds,
        Seg::Fs => SegmentName::Fs,
        Seg::Gs => SegmentName::Gs,
        Seg::Tr => return None,
    })
}

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn system(&mut self, system: System) -> Result<Flow, Fault> {
        match system {
            System::LoadSegment => self.load_segment()?,
            System::PopSegment => self.pop_segment()?,
            System::LoadFar => self.load_far()?,
            System::JumpFar => return self.far_jump(),
            System::CallFar => return self.far_call(),
            System::ReturnFar => return self.far_return(),
            System::InterruptReturn => return self.interrupt_return(),
            System::Interrupt => return self.software_interrupt(),
            System::Breakpoint => return self.trap_to(3, true),
            System::Overflow if self.cpu.rflags() & flags::OF != 0 => return self.trap_to(4, true),
            System::Overflow => {}
            System::DebugTrap => return self.trap_to(1, false),
            System::StoreTable(interrupts) => self.store_table(interrupts)?,
            System::LoadTable(interrupts) => self.load_table(interrupts)?,
            System::StoreSelector(task) => self.store_selector(task)?,
            System::LoadLdt => self.load_ldt()?,
            System::LoadTask => self.load_task()?,
            System::StoreStatus => self.store_status()?,
            System::LoadStatus => self.load_status()?,
            System::ClearTaskSwitched => {
                self.privileged()?;
                let now = self.control_registers();
                self.change_controls(&now, Ok(control_regs::clear_task_switched(&now)))?;
            }
            System::ReadControl => self.read_control()?,
            System::WriteControl => self.write_control()?,
            System::ReadDebug => self.read_debug()?,
            System::WriteDebug => self.write_debug()?,
            System::InvalidatePage => self.invalidate_page()?,
            System::InvalidateContext => self.invalidate_context()?,
            System::CacheFlush => self.privileged()?,
            System::Halt => {
                self.privileged()?;
                self.cpu.halt();
            }
            System::Cpuid => self.cpuid(),
            System::ReadMsr => self.read_msr()?,
            System::WriteMsr => self.write_msr()?,
            System::ReadXcr => self.read_xcr()?,
            System::WriteXcr => self.write_xcr()?,
            System::SwapGs => self.swap_gs()?,
            System::Sysenter => return self.sysenter(),
            System::Sysexit => return self.sysexit(),
            System::Syscall => return self.syscall(),
            System::Sysret => return self.sysret(),
            System::Rights => self.rights()?,
            System::Limit => self.limit()?,
            System::Verify(write) => self.verify(write)?,
            System::AdjustRpl => self.adjust_rpl()?,
            System::Refused => return Err(self.general_protection().into()),
            System::Undefined => return Err(Exception::INVALID_OPCODE.into()),
        }
        Ok(Flow::Next)
    }

    /// #GP(0) above level 0.
    fn privileged(&self) -> Result<(), Fault> {
        if self.cpu.cpl() == 0 {
            Ok(())
        } else {
            Err(self.general_protection().into())
        }
    }

    /// #UD in real and virtual-8086 mode.
    fn protected_only(&self) -> Result<(), Fault> {
        if matches!(self.mode, Mode::Real | Mode::Vm86) {
            Err(Exception::INVALID_OPCODE.into())
        } else {
            Ok(())
        }
    }

    /// #GP(0) for programs where CR4.UMIP hides the system's registers.
    fn not_hidden(&self) -> Result<(), Fault> {
        if self.cpu.cpl() != 0 && self.cpu.state().cr4 & CR4_UMIP != 0 {
            return self.privileged();
        }
        Ok(())
    }

    fn load_segment(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, .. } = *self.insn;
        let Operand::Seg(seg) = dst else { return Err(Exception::INVALID_OPCODE.into()) };
        let (Some(name), true) = (name(seg), seg != Seg::Cs) else {
            return Err(Exception::INVALID_OPCODE.into());
        };
        let selector = self.read_operand(src, 2)? as u16;
        let mut change = Change::new(self.cpu);
        change.load_segment(name, selector)?;
        change.commit()?;
        self.shadow_stack_load(seg);
        Ok(())
    }

    fn pop_segment(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let Operand::Seg(seg) = dst else { return Err(Exception::INVALID_OPCODE.into()) };
        let Some(name) = name(seg) else { return Err(Exception::INVALID_OPCODE.into()) };
        let mut change = Change::new(self.cpu);
        let mut stack = change.stack();
        let selector = change.peek(&stack, 0, 2)? as u16;
        stack.advance(size.into());
        change.load_segment(name, selector)?;
        change.rsp = stack.pointer;
        change.commit()?;
        self.shadow_stack_load(seg);
        Ok(())
    }

    /// MOV SS and POP SS begin an interrupt shadow, and their own trap is not taken. SDM vol. 3, 6.8.3.
    fn shadow_stack_load(&mut self, seg: Seg) {
        if seg == Seg::Ss {
            self.shadow = true;
            self.traced = Some(false);
        }
    }

    /// LDS, LES, LFS, LGS, LSS.
    fn load_far(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, third, size, .. } = *self.insn;
        let Operand::Seg(seg) = third else { return Err(Exception::INVALID_OPCODE.into()) };
        let Some(name) = name(seg) else { return Err(Exception::INVALID_OPCODE.into()) };
        let (selector, offset) = self.far_pointer()?;
        let mut change = Change::new(self.cpu);
        change.load_segment(name, selector)?;
        change.commit()?;
        self.write_operand(dst, size, offset)
    }

    /// SGDT and SIDT: limit, then 4 bytes of base, or 8 in 64-bit mode.
    fn store_table(&mut self, interrupts: bool) -> Result<(), Fault> {
        self.not_hidden()?;
        let state = self.cpu.state();
        let TableRegister { base, limit } = if interrupts { state.idtr } else { state.gdtr };
        let size = if self.mode == Mode::Long64 { 8 } else { 4 };
        let (limit_at, base_at) = self.table_operand(size, AccessKind::Write)?;
        let access = super::Access { kind: AccessKind::Write, sole: false };
        self.cpu.probe_write(base_at, size, access)?;
        self.store(limit_at, 2, limit.into())?;
        self.store(base_at, size, base)
    }

    /// LGDT and LIDT: with 16-bit operands the base has 24 bits.
    fn load_table(&mut self, interrupts: bool) -> Result<(), Fault> {
        self.privileged()?;
        let size = if self.mode == Mode::Long64 { 8 } else { 4 };
        let (limit_at, base_at) = self.table_operand(size, AccessKind::Read)?;
        let limit = self.load(limit_at, 2, AccessKind::Read)? as u16;
        let mut base = self.load(base_at, size, AccessKind::Read)?;
        if self.insn.size == 2 {
            base &= 0xff_ffff;
        }
        if !self.canonical(base) {
            return Err(self.general_protection().into());
        }
        let mut state = self.cpu.state();
        let table = if interrupts { &mut state.idtr } else { &mut state.gdtr };
        *table = TableRegister { base, limit };
        self.cpu.set_state(&state);
        Ok(())
    }

    /// Where limit and base of a table's operand lie.
    fn table_operand(&self, size: u8, kind: AccessKind) -> Result<(u64, u64), Fault> {
        let seg = self.insn.mem.seg;
        let offset = self.offset(0);
        let behind = offset.wrapping_add(2) & mask(self.insn.mem.size);
        Ok((self.linear(seg, offset, 2, kind)?, self.linear(seg, behind, size, kind)?))
    }

    /// SLDT and STR.
    fn store_selector(&mut self, task: bool) -> Result<(), Fault> {
        self.protected_only()?;
        self.not_hidden()?;
        let DecodedInsn { dst, size, .. } = *self.insn;
        let state = self.cpu.state();
        let selector = if task { state.tr.selector } else { state.ldtr.selector };
        self.write_operand(dst, size, selector.into())
    }

    fn load_ldt(&mut self) -> Result<(), Fault> {
        self.protected_only()?;
        self.privileged()?;
        let selector = self.read_operand(self.insn.dst, 2)? as u16;
        let mut change = Change::new(self.cpu);
        if is_null(selector) {
            change.state.ldtr = Segment { selector, ..Segment::default() };
        } else {
            change.state.ldtr = change.system_segment(selector, &[system_type::LDT])?.1;
        }
        change.commit()?;
        Ok(())
    }

    fn load_task(&mut self) -> Result<(), Fault> {
        self.protected_only()?;
        self.privileged()?;
        let selector = self.read_operand(self.insn.dst, 2)? as u16;
        let mut change = Change::new(self.cpu);
        if is_null(selector) {
            return Err(change.fault(GP, 0));
        }
        let known: &[u8] =
            if change.long_mode() { &[system_type::TSS] } else { &[system_type::TSS, system_type::TSS_16] };
        let (descriptor, mut segment) = change.system_segment(selector, known)?;
        segment.attributes |= u16::from(BUSY);
        change.mark(&descriptor, BUSY)?;
        change.state.tr = segment;
        change.commit()?;
        Ok(())
    }

    fn control_registers(&self) -> Now {
        (&self.cpu.state()).into()
    }

    /// Makes the change that a write of a control register means.
    fn change_controls(
        &mut self,
        now: &Now,
        change: Result<control_regs::Change, GeneralProtection>,
    ) -> Result<(), Fault> {
        match change.and_then(|change| self.cpu.change_controls(now, &change)) {
            Ok(()) => Ok(()),
            Err(GeneralProtection) => Err(self.general_protection().into()),
        }
    }

    /// SMSW.
    fn store_status(&mut self) -> Result<(), Fault> {
        self.not_hidden()?;
        let DecodedInsn { dst, size, .. } = *self.insn;
        self.write_operand(dst, size, self.cpu.cr0())
    }

    /// LMSW.
    fn load_status(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let value = self.read_operand(self.insn.dst, 2)? as u16;
        let (now, limits) = (self.control_registers(), self.cpu.limits());
        self.change_controls(&now, control_regs::write_machine_status(&now, value, &limits))
    }

    fn read_control(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let Operand::Control(number) = src else { return Err(Exception::INVALID_OPCODE.into()) };
        let state = self.cpu.state();
        let value = match number {
            0 => state.cr0,
            2 => state.cr2,
            3 => state.cr3,
            4 => state.cr4,
            8 => self.cpu.cr8().into(),
            _ => return Err(Exception::INVALID_OPCODE.into()),
        };
        self.privileged()?;
        self.write_operand(dst, size, value)
    }

    fn write_control(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let Operand::Control(number) = dst else { return Err(Exception::INVALID_OPCODE.into()) };
        if !matches!(number, 0 | 2 | 3 | 4 | 8) {
            return Err(Exception::INVALID_OPCODE.into());
        }
        self.privileged()?;
        let value = self.read_operand(src, size)?;
        let (now, limits) = (self.control_registers(), self.cpu.limits());
        match number {
            0 => self.change_controls(&now, control_regs::write_cr0(&now, value, &limits)),
            3 => self.change_controls(&now, control_regs::write_cr3(&now, value, &limits)),
            4 => self.change_controls(&now, control_regs::write_cr4(&now, value, &limits)),
            8 => match control_regs::write_cr8(value) {
                Ok(priority) => {
                    self.cpu.set_cr8(priority);
                    Ok(())
                }
                Err(GeneralProtection) => Err(self.general_protection().into()),
            },
            _ => {
                let mut state = self.cpu.state();
                state.cr2 = value;
                self.cpu.set_state(&state);
                Ok(())
            }
        }
    }

    /// The number of a debug register that may be accessed; DR4 and DR5 are other names of DR6 and DR7 unless CR4.DE
    /// is set. SDM vol. 3, 17.2.
    fn debug_register(&mut self, operand: Operand) -> Result<u8, Fault> {
        let Operand::Debug(number) = operand else { return Err(Exception::INVALID_OPCODE.into()) };
        let mut state = self.cpu.state();
        if number > 7 || (matches!(number, 4 | 5) && state.cr4 & CR4_DE != 0) {
            return Err(Exception::INVALID_OPCODE.into());
        }
        self.privileged()?;
        if state.dr7 & DR7_GD != 0 {
            // GD ends here, for the exception may be injected by hardware, which does not touch it.
            state.dr6 |= DR6_BD;
            state.dr7 &= !DR7_GD;
            self.cpu.set_state(&state);
            return Err(DB.into());
        }
        Ok(if matches!(number, 4 | 5) { number + 2 } else { number })
    }

    fn read_debug(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let value = match self.debug_register(src)? {
            6 => self.cpu.state().dr6,
            7 => self.cpu.state().dr7,
            number => self.cpu.breakpoint(number),
        };
        self.write_operand(dst, size, value)
    }

    fn write_debug(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let number = self.debug_register(dst)?;
        let value = self.read_operand(src, size)?;
        if number < 4 {
            self.cpu.set_breakpoint(number, value);
            return Ok(());
        }
        if value >> 32 != 0 {
            return Err(self.general_protection().into());
        }
        let mut state = self.cpu.state();
        if number == 6 {
            state.dr6 = value & DR6_WRITABLE | DR6_FIXED;
        } else {
            state.dr7 = value & DR7_WRITABLE | DR7_FIXED;
        }
        self.cpu.set_state(&state);
        Ok(())
    }

    /// INVLPG: no access is made, and no limit counts.
    fn invalidate_page(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let seg = self.insn.mem.seg;
        let based = self.mode != Mode::Long64 || matches!(seg, Seg::Fs | Seg::Gs);
        let base = if based { self.cpu.segment(seg).base } else { 0 };
        let linear = base.wrapping_add(self.offset(0));
        self.cpu.invalidate(if self.mode == Mode::Long64 { linear } else { linear & mask(4) });
        Ok(())
    }

    /// INVPCID.
    fn invalidate_context(&mut self) -> Result<(), Fault> {
        const HAS_INVPCID: u32 = 1 << 10;
        if self.cpu.cpuid(7, 0)[1] & HAS_INVPCID == 0 {
            return Err(Exception::INVALID_OPCODE.into());
        }
        self.privileged()?;
        let kind = self.read_operand(self.insn.dst, if self.mode == Mode::Long64 { 8 } else { 4 })?;
        let first = self.linear(self.insn.mem.seg, self.offset(0), 16, AccessKind::Read)?;
        let pcid = self.load(first, 8, AccessKind::Read)?;
        let linear = self.load(first + 8, 8, AccessKind::Read)?;
        let pcids = self.cpu.state().cr4 & CR4_PCIDE != 0;
        if kind > 3
            || pcid >> 12 != 0
            || (kind == 0 && !self.canonical(linear))
            || (kind < 2 && pcid != 0 && !pcids)
        {
            return Err(self.general_protection().into());
        }
        self.cpu.invalidate_context(kind as u8, pcid as u16, linear);
        Ok(())
    }

    /// The 32-bit halves of a value in EDX:EAX.
    fn set_pair(&mut self, value: u64) {
        self.cpu.set_gpr(Gpr::Rax, value & mask(4));
        self.cpu.set_gpr(Gpr::Rdx, value >> 32);
    }

    fn pair(&self) -> u64 {
        self.cpu.gpr(Gpr::Rdx) << 32 | self.cpu.gpr(Gpr::Rax) & mask(4)
    }

    fn cpuid(&mut self) {
        let (leaf, subleaf) = (self.cpu.gpr(Gpr::Rax) as u32, self.cpu.gpr(Gpr::Rcx) as u32);
        let values = self.cpu.cpuid(leaf, subleaf);
        for (gpr, value) in [Gpr::Rax, Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].into_iter().zip(values) {
            self.cpu.set_gpr(gpr, value.into());
        }
    }

    fn read_msr(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let msr = self.cpu.gpr(Gpr::Rcx) as u32;
        let value = self.msr(msr)?;
        self.set_pair(value);
        Ok(())
    }

    fn write_msr(&mut self) -> Result<(), Fault> {
        self.privileged()?;
        let (msr, value) = (self.cpu.gpr(Gpr::Rcx) as u32, self.pair());
        if self.cpu.write_msr(msr, value) {
            Ok(())
        } else {
            Err(self.general_protection().into())
        }
    }

    fn msr(&mut self, msr: u32) -> Result<u64, Fault> {
        match self.cpu.read_msr(msr) {
            Some(value) => Ok(value),
            None => Err(self.general_protection().into()),
        }
    }

    fn has_xcr(&self) -> Result<(), Fault> {
        if self.cpu.state().cr4 & CR4_OSXSAVE != 0 {
            Ok(())
        } else {
            Err(Exception::INVALID_OPCODE.into())
        }
    }

    /// XGETBV of XCR0.
    fn read_xcr(&mut self) -> Result<(), Fault> {
        self.has_xcr()?;
        if self.cpu.gpr(Gpr::Rcx) & mask(4) != 0 {
            return Err(self.general_protection().into());
        }
        let value = self.cpu.xcr0();
        self.set_pair(value);
        Ok(())
    }

    /// XSETBV of XCR0.
    fn write_xcr(&mut self) -> Result<(), Fault> {
        self.has_xcr()?;
        self.privileged()?;
        let value = self.pair();
        if self.cpu.gpr(Gpr::Rcx) & mask(4) != 0 || !self.cpu.set_xcr0(value) {
            return Err(self.general_protection().into());
        }
        Ok(())
    }

    fn swap_gs(&mut self) -> Result<(), Fault> {
        if self.mode != Mode::Long64 {
            return Err(Exception::INVALID_OPCODE.into());
        }
        self.privileged()?;
        let kernel = self.msr(MSR_KERNEL_GS_BASE)?;
        let mut state = self.cpu.state();
        let gs = &mut state.segments[SegmentName::Gs as usize];
        let user = core::mem::replace(&mut gs.base, kernel);
        if !self.cpu.write_msr(MSR_KERNEL_GS_BASE, user) {
            return Err(self.general_protection().into());
        }
        self.cpu.set_state(&state);
        Ok(())
    }

    fn sysenter(&mut self) -> Result<Flow, Fault> {
        let long = self.in_long_mode();
        if long && self.cpu.limits().amd {
            return Err(Exception::INVALID_OPCODE.into());
        }
        let selector = self.msr(MSR_SYSENTER_CS)? as u16;
        if self.mode == Mode::Real || is_null(selector) {
            return Err(self.general_protection().into());
        }
        let width = if long { 8 } else { 4 };
        let (rsp, rip) = (self.msr(MSR_SYSENTER_ESP)?, self.msr(MSR_SYSENTER_EIP)?);
        let mut change = Change::new(self.cpu);
        change.set_flat(selector & !3, long, 0, 8);
        change.state.rflags &= !(VM | IF);
        change.state.rip = rip & mask(width);
        change.rsp = rsp & mask(width);
        arrive(change)
    }

    fn sysexit(&mut self) -> Result<Flow, Fault> {
        if self.in_long_mode() && self.cpu.limits().amd {
            return Err(Exception::INVALID_OPCODE.into());
        }
        let selector = self.msr(MSR_SYSENTER_CS)? as u16;
        if self.mode == Mode::Real || is_null(selector) {
            return Err(self.general_protection().into());
        }
        self.privileged()?;
        let long = self.insn.size == 8;
        let (rip, rsp) = (self.cpu.gpr(Gpr::Rdx), self.cpu.gpr(Gpr::Rcx));
        if long && !(self.canonical(rip) && self.canonical(rsp)) {
            return Err(self.general_protection().into());
        }
        let width = if long { 8 } else { 4 };
        let mut change = Change::new(self.cpu);
        let base = (selector & !3).wrapping_add(if long { 32 } else { 16 });
        change.set_flat(base, long, 3, 8);
        change.state.rip = rip & mask(width);
        change.rsp = rsp & mask(width);
        arrive(change)
    }

    fn in_long_mode(&self) -> bool {
        self.cpu.state().efer & crate::vm::msr::EFER_LMA != 0
    }

    /// #UD where SYSCALL and SYSRET do not exist: without EFER.SCE, in real mode, and for Intel outside 64-bit mode.
    fn has_syscall(&self) -> Result<(), Fault> {
        let enabled = self.cpu.state().efer & EFER_SCE != 0;
        let here = self.mode == Mode::Long64 || self.cpu.limits().amd;
        if enabled && here && self.cpu.cr0() & CR0_PE != 0 && self.mode != Mode::Real {
            Ok(())
        } else {
            Err(Exception::INVALID_OPCODE.into())
        }
    }

    fn syscall(&mut self) -> Result<Flow, Fault> {
        self.has_syscall()?;
        let long = self.in_long_mode();
        let star = self.msr(MSR_STAR)?;
        let next = self.next_rip();
        let (target, masked) = if long {
            let msr = if self.mode == Mode::Long64 { MSR_LSTAR } else { MSR_CSTAR };
            (self.msr(msr)?, self.msr(MSR_SFMASK)?)
        } else {
            (star & mask(4), VM | IF)
        };
        let rflags = self.cpu.rflags();
        let mut change = Change::new(self.cpu);
        change.set_flat((star >> 32) as u16 & !3, long, 0, 8);
        change.state.rip = target;
        // SFMASK decides on TF as well; a trap that it lets through comes before the handler's first instruction.
        change.state.rflags = rflags & !(masked | RF) | 2;
        let trap = change.state.rflags & TF != 0;
        change.commit()?.clear_interrupt_shadow();
        self.cpu.set_gpr(Gpr::Rcx, next);
        if long {
            self.cpu.set_gpr(Gpr::R11, rflags & !RF);
        }
        Ok(Flow::Ended(Outcome::Done { trap }))
    }

    fn sysret(&mut self) -> Result<Flow, Fault> {
        self.has_syscall()?;
        self.privileged()?;
        let long = self.insn.size == 8;
        let target = self.cpu.gpr(Gpr::Rcx);
        if long && !self.canonical(target) {
            return Err(self.general_protection().into());
        }
        let in_64_bit = self.mode == Mode::Long64;
        let (star, r11) = (self.msr(MSR_STAR)?, self.cpu.gpr(Gpr::R11));
        let base = (star >> 48) as u16;
        let mut change = Change::new(self.cpu);
        let code = if long { base.wrapping_add(16) } else { base };
        change.set_flat(code, long, 3, 0);
        change.segment_mut(SegmentName::Ss).selector = base.wrapping_add(8) | 3;
        change.state.rip = if long { target } else { target & mask(4) };
        change.state.rflags =
            if in_64_bit { r11 & DEFINED & !(RF | VM) | 2 } else { change.state.rflags | IF };
        arrive(change)
    }

    /// The descriptor that LAR, LSL, VERR and VERW are asked about, if the program may see it.
    fn visible_descriptor(&mut self, operand: Operand, systems: &[u8]) -> Result<Option<Descriptor>, Fault> {
        self.protected_only()?;
        let selector = self.read_operand(operand, 2)? as u16;
        if is_null(selector) {
            return Ok(None);
        }
        let mut change = Change::new(self.cpu);
        let Some(descriptor) = change.try_descriptor(selector)? else { return Ok(None) };
        let known = descriptor.is_segment() || systems.contains(&descriptor.kind());
        let level = change.cpl.max(rpl(selector));
        let visible = known && (descriptor.is_conforming() || descriptor.dpl() >= level);
        Ok(visible.then_some(descriptor))
    }

    fn set_zero_flag(&mut self, zero: bool) {
        let rflags = self.cpu.rflags();
        self.set_status(rflags & !ZF | if zero { ZF } else { 0 });
    }

    /// LAR.
    fn rights(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let systems: &[u8] =
            if self.in_long_mode() { &[2, 9, 0xb, 0xc] } else { &[1, 2, 3, 4, 5, 9, 0xb, 0xc] };
        let descriptor = self.visible_descriptor(src, systems)?;
        if let Some(descriptor) = descriptor {
            self.write_operand(dst, size, descriptor.low >> 32 & 0xf0_ff00)?;
        }
        self.set_zero_flag(descriptor.is_some());
        Ok(())
    }

    /// LSL.
    fn limit(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let systems: &[u8] = if self.in_long_mode() { &[2, 9, 0xb] } else { &[1, 2, 3, 9, 0xb] };
        let descriptor = self.visible_descriptor(src, systems)?;
        if let Some(descriptor) = descriptor {
            self.write_operand(dst, size, descriptor.limit().into())?;
        }
        self.set_zero_flag(descriptor.is_some());
        Ok(())
    }

    /// VERR and VERW.
    fn verify(&mut self, write: bool) -> Result<(), Fault> {
        let descriptor = self.visible_descriptor(self.insn.dst, &[])?;
        let verified = descriptor.is_some_and(|d| if write { d.is_writable() } else { d.is_readable() });
        self.set_zero_flag(verified);
        Ok(())
    }

    /// ARPL.
    fn adjust_rpl(&mut self) -> Result<(), Fault> {
        self.protected_only()?;
        let DecodedInsn { dst, src, .. } = *self.insn;
        let wanted = self.read_operand(src, 2)? & 3;
        let zero = if dst == Operand::Mem {
            let linear = self.operand_address(2, AccessKind::ReadModify)?;
            let selector = self.load(linear, 2, AccessKind::ReadModify)?;
            let raised = selector & 3 < wanted;
            if raised {
                self.store(linear, 2, selector & !3 | wanted)?;
            }
            raised
        } else {
            let selector = self.read_operand(dst, 2)?;
            let raised = selector & 3 < wanted;
            if raised {
                self.write_operand(dst, 2, selector & !3 | wanted)?;
            }
            raised
        };
        self.set_zero_flag(zero);
        Ok(())
    }
}

impl<C: Cpu> Change<'_, C> {
    /// The descriptor of LDT or TSS that `selector` names in the GDT, of one of the types `known`.
    fn system_segment(&mut self, selector: u16, known: &[u8]) -> Result<(Descriptor, Segment), Fault> {
        if selector & 4 != 0 {
            return Err(self.selector_fault(GP, selector));
        }
        let descriptor = self.descriptor(selector, GP)?;
        if descriptor.is_segment() || !known.contains(&descriptor.kind()) {
            return Err(self.selector_fault(GP, selector));
        }
        if !descriptor.is_present() {
            return Err(self.selector_fault(NP, selector));
        }
        let descriptor = self.widen(descriptor, selector, GP)?;
        let segment = descriptor.segment(selector);
        if self.long_mode() && !self.canonical(segment.base) {
            return Err(self.selector_fault(GP, selector));
        }
        Ok((descriptor, segment))
    }

    /// Loads CS and SS as system calls do: flat, for level `level`, SS `distance` behind CS.
    fn set_flat(&mut self, selector: u16, long: bool, level: u16, distance: u16) {
        let flat = |selector: u16, attributes: u16| Segment {
            selector: selector & !3 | level,
            attributes: attributes | level << 5,
            limit: 0xffff_ffff,
            base: 0,
        };
        let code = if long { FLAT_CODE_64 } else { FLAT_CODE };
        *self.segment_mut(SegmentName::Cs) = flat(selector, code);
        *self.segment_mut(SegmentName::Ss) = flat(selector.wrapping_add(distance), FLAT_DATA);
    }
}
