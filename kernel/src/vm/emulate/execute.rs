//! Executing a decoded instruction: dispatch, operands, data movement, completion.
use super::cpu::{Access, AccessKind, Cpu, Exception, Fault, Mode};
use super::decode::{DecodeError, DecodedInsn, Gpr, Op, Operand, Unsupported};
use super::flags::{self, mask, sign_extend, RF, STATUS, TF};
use super::Outcome;

/// One instruction being executed.
pub(super) struct Execution<'a, C> {
    pub(super) cpu: &'a mut C,
    pub(super) insn: &'a DecodedInsn,
    pub(super) mode: Mode,
    /// The next memory access is the instruction's only one.
    pub(super) sole: bool,
    /// Completion begins an interrupt shadow instead of ending one.
    pub(super) shadow: bool,
    /// Whether completion traps, where that is not TF's affair as it is then.
    pub(super) traced: Option<bool>,
}

/// Where an instruction that did not fault goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Behind it.
    Next,
    /// At this RIP.
    To(u64),
    /// With its next iteration.
    Again,
    /// Everything is done, RIP and RFLAGS included.
    Ended(Outcome),
}

/// Executes `insn` at `cpu`'s RIP.
#[inline]
pub(super) fn execute<C: Cpu>(cpu: &mut C, insn: &DecodedInsn, mode: Mode) -> Outcome {
    let mut execution = Execution { cpu, insn, mode, sole: insn.sole, shadow: false, traced: None };
    match execution.run() {
        Ok(flow) => execution.complete(flow),
        Err(fault) => failed(execution.cpu, fault),
    }
}

/// What bytes that are no known instruction do.
#[cold]
pub(super) fn rejected<C: Cpu>(cpu: &mut C, mode: Mode, error: DecodeError) -> Outcome {
    let fault = match error {
        DecodeError::Truncated => return Outcome::Truncated,
        DecodeError::Invalid => Exception::INVALID_OPCODE.into(),
        DecodeError::TooLong => {
            Exception { vector: 13, error_code: (mode != Mode::Real).then_some(0), cr2: None }.into()
        }
        // EVEX and XOP do not exist here. 3DNow!, which does on the CPUs that have it, is taken for one of them.
        DecodeError::Unknown if mode.is_8086() => Exception::INVALID_OPCODE.into(),
        DecodeError::Unknown => Fault::Unsupported("instruction unknown to the decoder"),
    };
    failed(cpu, fault)
}

#[cold]
pub(super) fn failed<C: Cpu>(cpu: &mut C, fault: Fault) -> Outcome {
    match fault {
        Fault::Exception(exception) => {
            let rflags = cpu.rflags();
            cpu.set_rflags(rflags | RF);
            Outcome::Exception(exception)
        }
        Fault::Retry => Outcome::Retry,
        Fault::Stop => Outcome::Stop,
        Fault::Unsupported(reason) => Outcome::Unsupported { reason },
    }
}

impl<C: Cpu> Execution<'_, C> {
    #[inline]
    fn run(&mut self) -> Result<Flow, Fault> {
        let DecodedInsn { op, dst, src, size, src_size, .. } = *self.insn;
        match op {
            Op::Mov | Op::Movzx => {
                let value = self.read_operand(src, src_size)?;
                self.write_operand(dst, size, value)?;
            }
            Op::Movsx => {
                let value = self.read_operand(src, src_size)?;
                self.write_operand(dst, size, sign_extend(value, src_size))?;
            }
            Op::Movbe => {
                let value = self.read_operand(src, size)?;
                self.write_operand(dst, size, value.swap_bytes() >> (64 - flags::bits(size)))?;
            }
            Op::Setcc(code) => {
                let value = flags::condition(code, self.cpu.rflags());
                self.write_operand(dst, size, u64::from(value))?;
            }
            Op::Cmovcc(code) => {
                // The source is read, and a 32-bit destination zero-extended, whatever the condition.
                let mut value = self.read_operand(src, src_size)?;
                if !flags::condition(code, self.cpu.rflags()) {
                    value = self.read_operand(dst, size)?;
                }
                self.write_operand(dst, size, value)?;
            }
            Op::Alu(alu) => self.alu(alu)?,
            Op::Test => self.test()?,
            Op::Unary(unary) => self.unary(unary)?,
            Op::Shift(shift) => self.shift(shift)?,
            Op::DoubleShift(left) => self.double_shift(left)?,
            Op::Bit(bit) => self.bit(bit)?,
            Op::Scan(scan) => self.scan(scan)?,
            Op::MulWide(signed) => self.multiply_wide(signed)?,
            Op::Imul => self.multiply()?,
            Op::Div(signed) => self.divide(signed)?,
            Op::Xchg => self.exchange()?,
            Op::Xadd => self.exchange_add()?,
            Op::Cmpxchg => self.compare_exchange()?,
            Op::CmpxchgPair => self.compare_exchange_pair()?,
            Op::Push => self.push()?,
            Op::Pop => self.pop()?,
            Op::Call => return self.call(),
            Op::Jmp => return self.jump(),
            Op::String(string) => return self.string(string),
            Op::In => self.input()?,
            Op::Out => self.output()?,
            Op::MovVector(aligned) => self.move_vector(aligned)?,
            op => return self.run_other(op),
        }
        Ok(Flow::Next)
    }

    /// What rarely touches a device, out of the way of what does.
    #[inline(never)]
    fn run_other(&mut self, op: Op) -> Result<Flow, Fault> {
        match op {
            Op::Nop => {}
            Op::Lea => self.load_address()?,
            Op::Bswap => self.swap_bytes()?,
            Op::Widen => self.widen(),
            Op::WidenPair => self.widen_pair(),
            Op::Xlat => self.translate_byte()?,
            Op::Bound => self.bound()?,
            Op::Salc => self.set_al_by_carry(),
            Op::CacheLine => self.cache_line()?,
            Op::ReadTsc(with_aux) => self.read_tsc(with_aux)?,
            Op::Random(seed) => self.random(seed)?,
            Op::Jcc(code) => return self.jump_if(flags::condition(code, self.cpu.rflags())),
            Op::Loop(kind) => return self.count_and_jump(kind),
            Op::Ret => return self.ret(),
            Op::PushAll => self.push_all()?,
            Op::PopAll => self.pop_all()?,
            Op::PushFlags => self.push_flags()?,
            Op::PopFlags => self.pop_flags()?,
            Op::Enter => self.enter()?,
            Op::Leave => self.leave()?,
            Op::Flag(flag) => self.change_flag(flag),
            Op::InterruptFlag(set) => self.change_interrupt_flag(set)?,
            Op::Lahf => self.load_ah(),
            Op::Sahf => self.store_ah(),
            Op::Decimal(decimal) => self.decimal(decimal)?,
            Op::AddCarry(overflow) => self.add_carry(overflow)?,
            Op::Crc32 => self.crc32()?,
            Op::Bmi(bmi) => self.bmi(bmi)?,
            Op::X87(x87) => self.x87(x87)?,
            Op::Unsupported(Unsupported::Vex) if self.mode.is_8086() => {
                return Err(Exception::INVALID_OPCODE.into());
            }
            Op::System(system) => return self.system(system),
            Op::Unsupported(what) => return Err(Fault::Unsupported(what.reason())),
            _ => return Err(Fault::Unsupported(Unsupported::Other.reason())),
        }
        Ok(Flow::Next)
    }

    #[inline]
    fn complete(&mut self, flow: Flow) -> Outcome {
        if let Flow::Ended(outcome) = flow {
            return outcome;
        }
        let rflags = self.cpu.rflags();
        let trap = self.traced.unwrap_or(rflags & TF != 0);
        if self.shadow {
            self.cpu.set_interrupt_shadow();
        } else {
            self.cpu.clear_interrupt_shadow();
        }
        let rip = match flow {
            Flow::Next | Flow::Ended(_) => self.next_rip(),
            Flow::To(rip) => rip,
            Flow::Again => {
                self.cpu.set_rflags(rflags | RF);
                return Outcome::Continue { trap };
            }
        };
        if rflags & RF != 0 {
            self.cpu.set_rflags(rflags & !RF);
        }
        self.cpu.set_rip(rip);
        Outcome::Done { trap }
    }

    /// RIP behind the instruction. Outside 64-bit mode it wraps at 4 GiB; in 16-bit code, where it can lie beyond
    /// 64 KiB only after a 32-bit branch, at 64 KiB.
    #[inline]
    pub(super) fn next_rip(&self) -> u64 {
        let rip = self.cpu.rip();
        let next = rip.wrapping_add(u64::from(self.insn.len));
        match self.mode {
            Mode::Long64 => next,
            Mode::Protected32 => next & mask(4),
            _ if rip <= mask(2) => next & mask(2),
            _ => next & mask(4),
        }
    }

    /// Value of an operand, zero-extended from `size` bytes.
    #[inline]
    pub(super) fn read_operand(&mut self, operand: Operand, size: u8) -> Result<u64, Fault> {
        Ok(match operand {
            Operand::Mem => {
                let linear = self.operand_address(size, AccessKind::Read)?;
                self.load(linear, size, AccessKind::Read)?
            }
            Operand::Imm => self.insn.imm & mask(size),
            Operand::Reg(gpr) => self.cpu.gpr(gpr) & mask(size),
            Operand::High(gpr) => self.cpu.gpr(gpr) >> 8 & 0xff,
            Operand::Seg(seg) => self.cpu.segment(seg).selector.into(),
            Operand::Xmm(_) | Operand::Control(_) | Operand::Debug(_) | Operand::Near | Operand::None => 0,
        })
    }

    /// Writes the low `size` bytes of `value` to an operand.
    #[inline]
    pub(super) fn write_operand(&mut self, operand: Operand, size: u8, value: u64) -> Result<(), Fault> {
        match operand {
            Operand::Mem => {
                let linear = self.operand_address(size, AccessKind::Write)?;
                self.store(linear, size, value)?;
            }
            Operand::Reg(gpr) => self.set_register(gpr, size, value),
            Operand::High(gpr) => {
                let rest = self.cpu.gpr(gpr) & !0xff00;
                self.cpu.set_gpr(gpr, rest | (value & 0xff) << 8);
            }
            Operand::Imm | Operand::Near | Operand::None => {}
            Operand::Xmm(_) | Operand::Seg(_) | Operand::Control(_) | Operand::Debug(_) => {}
        }
        Ok(())
    }

    /// Writes the low `size` bytes of a register: four zero-extend, fewer leave the rest.
    #[inline]
    pub(super) fn set_register(&mut self, gpr: Gpr, size: u8, value: u64) {
        let value = match size {
            8 => value,
            4 => value & mask(4),
            _ => self.cpu.gpr(gpr) & !mask(size) | value & mask(size),
        };
        self.cpu.set_gpr(gpr, value);
    }

    #[inline]
    pub(super) fn load(&mut self, linear: u64, size: u8, kind: AccessKind) -> Result<u64, Fault> {
        let access = Access { kind, sole: self.sole };
        self.cpu.read(linear, size, access)
    }

    #[inline]
    pub(super) fn store(&mut self, linear: u64, size: u8, value: u64) -> Result<(), Fault> {
        let access = Access { kind: AccessKind::Write, sole: self.sole };
        self.cpu.write(linear, size, value & mask(size), access)
    }

    /// Sets the six status flags.
    pub(super) fn set_status(&mut self, status: u64) {
        let rflags = self.cpu.rflags();
        self.cpu.set_rflags(rflags & !STATUS | status & STATUS);
    }

    /// SSE loads (zero-extended to 128 bits) and stores.
    fn move_vector(&mut self, aligned: bool) -> Result<(), Fault> {
        const UNREACHABLE: Fault =
            Fault::Unsupported("SSE instruction, and the vector registers are out of reach");
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let part = size.min(8);
        let (xmm, kind) = match (dst, src) {
            (Operand::Xmm(xmm), _) => (xmm, AccessKind::Read),
            (_, Operand::Xmm(xmm)) => (xmm, AccessKind::Write),
            _ => return Err(UNREACHABLE),
        };
        let value = self.cpu.xmm(xmm).ok_or(UNREACHABLE)?;
        let linear = self.operand_address(size, kind)?;
        if aligned && linear & 15 != 0 {
            return Err(self.general_protection().into());
        }
        if kind == AccessKind::Write {
            if size == 16 {
                let access = Access { kind, sole: false };
                self.cpu.probe_write(linear + 8, 8, access)?;
            }
            self.store(linear, part, value as u64)?;
            if size == 16 {
                self.store(linear + 8, part, (value >> 64) as u64)?;
            }
        } else {
            let mut value = u128::from(self.load(linear, part, kind)?);
            if size == 16 {
                value |= u128::from(self.load(linear + 8, part, kind)?) << 64;
            }
            if !self.cpu.set_xmm(xmm, value) {
                return Err(UNREACHABLE);
            }
        }
        Ok(())
    }
}
