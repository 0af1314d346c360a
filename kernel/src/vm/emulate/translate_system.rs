//! Decoding of system instructions and far transfers.
use super::decode::{DecodedInsn, Op, Operand, Repeat, Seg, System};
use super::translate::{gpr, segment, Translation};
use iced_x86::{Code, Mnemonic, OpKind, Register};

impl Translation<'_> {
    /// The instruction, if it is one of these.
    pub(super) fn system(&self) -> Option<DecodedInsn> {
        let insn = self.insn;
        let system = self.system_op()?;
        let operand = |index: u32| {
            if index >= insn.op_count() {
                return Operand::None;
            }
            match insn.try_op_kind(index) {
                Ok(OpKind::Register) => system_register(insn.op_register(index)),
                Ok(OpKind::Memory) => Operand::Mem,
                Ok(OpKind::Immediate8 | OpKind::Immediate16) => Operand::Imm,
                _ => Operand::None,
            }
        };
        let (mut dst, mut src, mut third) = (operand(0), operand(1), operand(2));
        let mut imm = self.immediate();
        let size = match system {
            System::JumpFar | System::CallFar if dst == Operand::Mem => {
                (dst, src) = (Operand::None, Operand::Mem);
                insn.memory_size().size() as u8 - 2
            }
            System::JumpFar | System::CallFar => {
                (dst, src) = (Operand::None, Operand::Imm);
                let wide = matches!(insn.try_op_kind(0), Ok(OpKind::FarBranch32));
                let offset = if wide { insn.far_branch32() } else { insn.far_branch16().into() };
                imm = u64::from(insn.far_branch_selector()) << 32 | u64::from(offset);
                if wide {
                    4
                } else {
                    2
                }
            }
            System::LoadFar => {
                third = Operand::Seg(match insn.mnemonic() {
                    Mnemonic::Lds => Seg::Ds,
                    Mnemonic::Les => Seg::Es,
                    Mnemonic::Lfs => Seg::Fs,
                    Mnemonic::Lgs => Seg::Gs,
                    _ => Seg::Ss,
                });
                insn.memory_size().size() as u8 - 2
            }
            System::PopSegment => insn.stack_pointer_increment().unsigned_abs() as u8,
            System::ReturnFar | System::InterruptReturn | System::LoadTable(_) => operand_size(insn.code()),
            System::Sysret | System::Sysexit => operand_size(insn.code()),
            // To memory goes a selector or a machine status word; a register is written whole.
            _ if dst == Operand::Mem => 2,
            _ if insn.op_count() > 0 && matches!(insn.try_op_kind(0), Ok(OpKind::Register)) => {
                let register = insn.op_register(0);
                let general = if gpr(register).is_some() { register } else { insn.op_register(1) };
                general.size().min(8) as u8
            }
            _ => 0,
        };
        Some(DecodedInsn {
            imm,
            mem: self.address(),
            op: Op::System(system),
            dst,
            src,
            third,
            len: insn.len() as u8,
            size,
            src_size: size,
            repeat: Repeat::Once,
            locked: false,
            sole: false,
        })
    }

    fn system_op(&self) -> Option<System> {
        use Mnemonic as M;
        let insn = self.insn;
        let is_register = |index: u32, test: fn(Register) -> bool| {
            index < insn.op_count()
                && matches!(insn.try_op_kind(index), Ok(OpKind::Register))
                && test(insn.op_register(index))
        };
        Some(match insn.mnemonic() {
            M::Mov if is_register(0, Register::is_segment_register) => System::LoadSegment,
            M::Mov if is_register(0, Register::is_cr) => System::WriteControl,
            M::Mov if is_register(1, Register::is_cr) => System::ReadControl,
            M::Mov if is_register(0, Register::is_dr) => System::WriteDebug,
            M::Mov if is_register(1, Register::is_dr) => System::ReadDebug,
            M::Pop if is_register(0, Register::is_segment_register) => System::PopSegment,
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => System::LoadFar,
            M::Jmp if insn.is_jmp_far() || insn.is_jmp_far_indirect() => System::JumpFar,
            M::Call if insn.is_call_far() || insn.is_call_far_indirect() => System::CallFar,
            M::Retf => System::ReturnFar,
            M::Iret | M::Iretd | M::Iretq => System::InterruptReturn,
            M::Int => System::Interrupt,
            M::Int3 => System::Breakpoint,
            M::Into => System::Overflow,
            M::Int1 => System::DebugTrap,
            M::Sgdt => System::StoreTable(false),
            M::Sidt => System::StoreTable(true),
            M::Lgdt => System::LoadTable(false),
            M::Lidt => System::LoadTable(true),
            M::Sldt => System::StoreSelector(false),
            M::Str => System::StoreSelector(true),
            M::Lldt => System::LoadLdt,
            M::Ltr => System::LoadTask,
            M::Smsw => System::StoreStatus,
            M::Lmsw => System::LoadStatus,
            M::Clts => System::ClearTaskSwitched,
            M::Invlpg => System::InvalidatePage,
            M::Invpcid => System::InvalidateContext,
            M::Invd | M::Wbinvd | M::Wbnoinvd => System::CacheFlush,
            M::Hlt => System::Halt,
            M::Cpuid => System::Cpuid,
            M::Rdmsr => System::ReadMsr,
            M::Wrmsr => System::WriteMsr,
            M::Rdpmc => System::Refused,
            M::Xgetbv => System::ReadXcr,
            M::Xsetbv => System::WriteXcr,
            M::Swapgs => System::SwapGs,
            M::Sysenter => System::Sysenter,
            M::Sysexit | M::Sysexitq => System::Sysexit,
            M::Syscall => System::Syscall,
            M::Sysret | M::Sysretq => System::Sysret,
            M::Lar => System::Rights,
            M::Lsl => System::Limit,
            M::Verr => System::Verify(false),
            M::Verw => System::Verify(true),
            M::Arpl => System::AdjustRpl,
            // What the virtual CPU does not have: MONITOR, SMM, SMX, both kinds of virtualization.
            M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Rsm | M::Getsec => System::Undefined,
            M::Vmcall | M::Vmlaunch | M::Vmresume | M::Vmxoff | M::Vmxon | M::Vmclear => System::Undefined,
            M::Vmptrld | M::Vmptrst | M::Vmread | M::Vmwrite | M::Vmfunc => System::Undefined,
            M::Invept | M::Invvpid => System::Undefined,
            M::Vmrun | M::Vmmcall | M::Vmload | M::Vmsave | M::Stgi | M::Clgi => System::Undefined,
            M::Skinit | M::Invlpga => System::Undefined,
            M::Ud0 | M::Ud1 | M::Ud2 => System::Undefined,
            _ => return None,
        })
    }
}

/// Operand size that the code of an instruction says.
fn operand_size(code: Code) -> u8 {
    match code {
        Code::Retfw | Code::Retfw_imm16 | Code::Iretw | Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
        Code::Retfq | Code::Retfq_imm16 | Code::Iretq | Code::Lgdt_m1664 | Code::Lidt_m1664 => 8,
        Code::Sysretq | Code::Sysexitq => 8,
        _ => 4,
    }
}

fn system_register(register: Register) -> Operand {
    if register.is_segment_register() {
        Operand::Seg(segment(register))
    } else if register.is_cr() {
        Operand::Control(register.number() as u8)
    } else if register.is_dr() {
        Operand::Debug(register.number() as u8)
    } else {
        gpr(register).map_or(Operand::None, Operand::Reg)
    }
}
