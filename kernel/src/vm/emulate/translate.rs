//! Decoding: iced-x86's instruction translated into the compact form.
use super::decode::{
    Address, Alu, Base, BitOp, Bmi, Decimal, DecodeError, DecodedInsn, FlagOp, Gpr, Loop, Op, Operand,
    Repeat, Scan, Seg, StringOp, Unary, Unsupported, MAX_LEN, X87,
};
use super::flags::Shift;
use iced_x86::{
    Code, ConditionCode, Decoder, DecoderError, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind,
    Register,
};

/// Prefetches and what CET and MPX put into the reserved NOPs do nothing here: guests have neither.
const OPTIONS: u32 = DecoderOptions::FORCE_RESERVED_NOP;

impl DecodedInsn {
    /// Decodes the instruction that `bytes` begin with, as code of 16, 32 or 64 bits. No more than 15 bytes are
    /// looked at.
    pub(super) fn decode(bitness: u32, bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes = &bytes[..bytes.len().min(MAX_LEN)];
        let Ok(mut decoder) = Decoder::try_with_ip(bitness, bytes, 0, OPTIONS) else {
            return Err(DecodeError::Unknown);
        };
        let insn = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => Ok(Translation { insn: &insn, bitness, bytes }.translate()),
            DecoderError::NoMoreBytes => Err(DecodeError::Truncated),
            _ => Err(why_invalid(bitness, bytes)),
        }
    }
}

/// Prefix bytes at the start of `bytes`, REX included.
fn prefixes(bitness: u32, bytes: &[u8]) -> &[u8] {
    let is_prefix = |b: &u8| match b {
        0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => true,
        0x40..=0x4f => bitness == 64,
        _ => false,
    };
    &bytes[..bytes.iter().take_while(|b| is_prefix(b)).count()]
}

/// The decoder rejected the bytes: is that the processor's #UD, its #GP for more than 15 bytes, or only the decoder?
fn why_invalid(bitness: u32, bytes: &[u8]) -> DecodeError {
    let opcode = &bytes[prefixes(bitness, bytes).len()..];
    match opcode {
        [] => DecodeError::TooLong,
        // EVEX and XOP share opcodes with BOUND and POP in a way that iced-x86 sorts out when told to know them.
        [0x62 | 0x8f, ..] | [0x0f, 0x0f, ..] => DecodeError::Unknown,
        _ if bytes.len() == MAX_LEN && fits_when_longer(bitness, bytes) => DecodeError::TooLong,
        _ => DecodeError::Invalid,
    }
}

/// Whether all 15 bytes are the beginning of a valid instruction. One redundant prefix less makes room for the end.
fn fits_when_longer(bitness: u32, bytes: &[u8]) -> bool {
    let prefixes = prefixes(bitness, bytes).len();
    (1..=prefixes).any(|dropped| {
        let shorter = &bytes[dropped..];
        Decoder::try_with_ip(bitness, shorter, 0, OPTIONS).is_ok_and(|mut decoder| {
            let _ = decoder.decode();
            decoder.last_error() == DecoderError::NoMoreBytes
        })
    })
}

pub(super) struct Translation<'a> {
    pub(super) insn: &'a Instruction,
    bitness: u32,
    bytes: &'a [u8],
}

impl Translation<'_> {
    fn translate(&self) -> DecodedInsn {
        if let Some(decoded) = self.system() {
            return decoded;
        }
        let insn = self.insn;
        let (mut op, dst, src, third);
        if insn.is_string_instruction() {
            (dst, src, third) = (Operand::None, Operand::None, Operand::None);
            op = string_op(insn.mnemonic());
        } else {
            (dst, src, third) = (self.operand(0), self.operand(1), self.operand(2));
            op = self.op();
            // An operand of a kind that has no name here is one that is not emulated.
            for (index, operand) in [dst, src, third].into_iter().enumerate() {
                if operand == Operand::None && (index as u32) < insn.op_count() {
                    op = Op::Unsupported(self.unsupported());
                }
            }
        }
        if insn.op_count() > 3 || (matches!(op, Op::MovVector(_)) && !self.moves_vector_memory()) {
            op = Op::Unsupported(self.unsupported());
        }
        let memory_operands = match op {
            Op::String(StringOp::Movs | StringOp::Cmps) => 2,
            Op::String(_) => 1,
            Op::Push | Op::Pop | Op::Call => 1 + usize::from(dst == Operand::Mem),
            Op::Ret | Op::Leave | Op::PushFlags | Op::PopFlags => 1,
            _ => [dst, src, third].iter().filter(|o| **o == Operand::Mem).count(),
        };
        let size = match op {
            Op::MovVector(_) | Op::String(_) => insn.memory_size().size().min(16) as u8,
            Op::Push | Op::PushFlags | Op::PopFlags => insn.stack_pointer_increment().unsigned_abs() as u8,
            Op::PushAll | Op::PopAll => (insn.stack_pointer_increment().unsigned_abs() / 8) as u8,
            Op::Ret | Op::Enter | Op::Leave => self.frame_size(),
            Op::Widen | Op::WidenPair => self.accumulator_size(),
            _ => self.size(0),
        };
        DecodedInsn {
            imm: self.immediate(),
            mem: match op {
                Op::Loop(_) => Address { size: self.count_size(), ..DecodedInsn::EMPTY.mem },
                _ => self.address(),
            },
            op,
            dst,
            src,
            third,
            len: insn.len() as u8,
            size,
            src_size: if src == Operand::Imm { size } else { self.size(1) },
            repeat: if insn.has_repe_prefix() {
                Repeat::Equal
            } else if insn.has_repne_prefix() {
                Repeat::NotEqual
            } else {
                Repeat::Once
            },
            locked: insn.has_lock_prefix() || (op == Op::Xchg && dst == Operand::Mem),
            sole: memory_operands == 1,
        }
    }

    fn operand(&self, index: u32) -> Operand {
        if index >= self.insn.op_count() {
            return Operand::None;
        }
        match self.insn.try_op_kind(index) {
            Ok(OpKind::Register) => register(self.insn.op_register(index)),
            Ok(OpKind::Memory) if !self.insn.is_vsib() => Operand::Mem,
            Ok(
                OpKind::Immediate8
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64,
            ) => Operand::Imm,
            Ok(OpKind::Immediate8_2nd) if self.insn.mnemonic() == Mnemonic::Enter => Operand::Imm,
            Ok(OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64) => Operand::Near,
            _ => Operand::None,
        }
    }

    /// Bytes of operand `index`.
    fn size(&self, index: u32) -> u8 {
        let insn = self.insn;
        let size = match insn.try_op_kind(index) {
            _ if index >= insn.op_count() => 0,
            Ok(OpKind::Register) => insn.op_register(index).size(),
            Ok(OpKind::Memory) => insn.memory_size().size(),
            Ok(kind) if is_string_operand(kind) => insn.memory_size().size(),
            Ok(OpKind::NearBranch16) => 2,
            Ok(OpKind::NearBranch32) => 4,
            Ok(OpKind::NearBranch64) => 8,
            // PUSH of an immediate and the like: what the stack moves by.
            Ok(_) => insn.stack_pointer_increment().unsigned_abs() as usize,
            Err(_) => 0,
        };
        size.min(64) as u8
    }

    /// Operand size of RET, ENTER and LEAVE, whose operands do not show it.
    fn frame_size(&self) -> u8 {
        match self.insn.code() {
            Code::Retnw | Code::Retnw_imm16 | Code::Enterw_imm16_imm8 | Code::Leavew => 2,
            Code::Retnd | Code::Retnd_imm16 | Code::Enterd_imm16_imm8 | Code::Leaved => 4,
            _ => 8,
        }
    }

    /// Bytes of the result of CBW, CWDE and CDQE, and of each half of that of CWD, CDQ and CQO.
    fn accumulator_size(&self) -> u8 {
        match self.insn.mnemonic() {
            Mnemonic::Cbw | Mnemonic::Cwd => 2,
            Mnemonic::Cwde | Mnemonic::Cdq => 4,
            _ => 8,
        }
    }

    /// Bytes of the count register of LOOP and JCXZ: the address size.
    fn count_size(&self) -> u8 {
        match (self.bitness, prefixes(self.bitness, self.bytes).contains(&0x67)) {
            (16, false) | (32, true) => 2,
            (64, false) => 8,
            _ => 4,
        }
    }

    pub(super) fn immediate(&self) -> u64 {
        let insn = self.insn;
        match insn.op0_kind() {
            // Decoded for address 0, so the target is the distance.
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => insn.near_branch_target(),
            _ if insn.mnemonic() == Mnemonic::Enter => {
                u64::from(insn.immediate16()) | u64::from(insn.immediate8_2nd()) << 16
            }
            _ => (0..insn.op_count().min(3)).find_map(|i| insn.try_immediate(i).ok()).unwrap_or(0),
        }
    }

    pub(super) fn address(&self) -> Address {
        let insn = self.insn;
        let kinds = || (0..insn.op_count()).filter_map(|i| insn.try_op_kind(i).ok());
        if let Some(size) = kinds().find_map(string_address_size) {
            let seg = if insn.segment_prefix() == Register::None || kinds().all(|k| !is_source_string(k)) {
                Seg::Ds
            } else {
                segment(insn.segment_prefix())
            };
            let seg = if self.bitness == 64 && !matches!(seg, Seg::Fs | Seg::Gs) { Seg::Ds } else { seg };
            return Address { base: Base::None, index: None, scale: 0, size, seg, displacement: 0 };
        }
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let size = match (base, index) {
            (Register::None, Register::None) => insn.memory_displ_size(),
            (Register::None, register) | (register, _) => register.size() as u32,
        };
        let override_ = match insn.segment_prefix() {
            Register::None => None,
            // AMD APM vol. 2, 4.5.3: overrides other than FS and GS are ignored in 64-bit mode.
            Register::ES | Register::CS | Register::SS | Register::DS if self.bitness == 64 => None,
            register => Some(segment(register)),
        };
        let seg = override_.unwrap_or(match base {
            Register::SP | Register::ESP | Register::RSP => Seg::Ss,
            Register::BP | Register::EBP | Register::RBP => Seg::Ss,
            _ => Seg::Ds,
        });
        Address {
            base: match base {
                Register::RIP | Register::EIP => Base::Rip,
                register => gpr(register).map_or(Base::None, Base::Reg),
            },
            index: gpr(index),
            scale: insn.memory_index_scale().trailing_zeros() as u8,
            size: if matches!(size, 2 | 4) { size as u8 } else { 8 },
            seg,
            displacement: insn.memory_displacement64(),
        }
    }

    fn unsupported(&self) -> Unsupported {
        let insn = self.insn;
        let is = |test: fn(Register) -> bool| {
            (0..insn.op_count()).any(|i| insn.try_op_register(i).is_ok_and(test))
        };
        if insn.encoding() == EncodingKind::VEX {
            Unsupported::Vex
        } else if is(|r| r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k()) {
            Unsupported::Vector
        } else {
            Unsupported::Other
        }
    }

    /// The operation of an instruction that is not a string instruction.
    fn op(&self) -> Op {
        use Mnemonic as M;
        let insn = self.insn;
        let condition = match insn.condition_code() {
            ConditionCode::None => 0,
            code => code as u8 - 1,
        };
        match insn.mnemonic() {
            M::Mov | M::Movnti => Op::Mov,
            M::Movzx => Op::Movzx,
            M::Movsx | M::Movsxd => Op::Movsx,
            M::Movbe => Op::Movbe,
            M::Add => Op::Alu(Alu::Add),
            M::Or => Op::Alu(Alu::Or),
            M::Adc => Op::Alu(Alu::Adc),
            M::Sbb => Op::Alu(Alu::Sbb),
            M::And => Op::Alu(Alu::And),
            M::Sub => Op::Alu(Alu::Sub),
            M::Xor => Op::Alu(Alu::Xor),
            M::Cmp => Op::Alu(Alu::Cmp),
            M::Test => Op::Test,
            M::Inc => Op::Unary(Unary::Inc),
            M::Dec => Op::Unary(Unary::Dec),
            M::Not => Op::Unary(Unary::Not),
            M::Neg => Op::Unary(Unary::Neg),
            M::Rol => Op::Shift(Shift::Rol),
            M::Ror => Op::Shift(Shift::Ror),
            M::Rcl => Op::Shift(Shift::Rcl),
            M::Rcr => Op::Shift(Shift::Rcr),
            M::Shl | M::Sal => Op::Shift(Shift::Shl),
            M::Shr => Op::Shift(Shift::Shr),
            M::Sar => Op::Shift(Shift::Sar),
            M::Shld => Op::DoubleShift(true),
            M::Shrd => Op::DoubleShift(false),
            M::Bt => Op::Bit(BitOp::Test),
            M::Bts => Op::Bit(BitOp::Set),
            M::Btr => Op::Bit(BitOp::Reset),
            M::Btc => Op::Bit(BitOp::Complement),
            M::Bsf => Op::Scan(Scan::Bsf),
            M::Bsr => Op::Scan(Scan::Bsr),
            M::Tzcnt => Op::Scan(Scan::Tzcnt),
            M::Lzcnt => Op::Scan(Scan::Lzcnt),
            M::Popcnt => Op::Scan(Scan::Popcnt),
            M::Xchg => Op::Xchg,
            M::Xadd => Op::Xadd,
            M::Cmpxchg => Op::Cmpxchg,
            M::Cmpxchg8b | M::Cmpxchg16b => Op::CmpxchgPair,
            M::Mul => Op::MulWide(false),
            M::Imul if insn.op_count() == 1 => Op::MulWide(true),
            M::Imul => Op::Imul,
            M::Div => Op::Div(false),
            M::Idiv => Op::Div(true),
            M::Push => Op::Push,
            M::Pop => Op::Pop,
            M::Call if insn.is_call_near_indirect() || insn.is_call_near() => self.near(Op::Call),
            M::Jmp if insn.is_jmp_near_indirect() || insn.is_jmp_short_or_near() => self.near(Op::Jmp),
            M::In => Op::In,
            M::Out => Op::Out,
            M::Movups | M::Movupd | M::Movdqu | M::Lddqu => Op::MovVector(false),
            M::Movaps | M::Movapd | M::Movdqa | M::Movntdqa | M::Movntps | M::Movntpd | M::Movntdq => {
                Op::MovVector(true)
            }
            M::Movd | M::Movq => Op::MovVector(false),
            M::Nop | M::Reservednop | M::Pause | M::Lfence | M::Sfence | M::Mfence => Op::Nop,
            M::Lea => Op::Lea,
            M::Bswap => Op::Bswap,
            M::Cbw | M::Cwde | M::Cdqe => Op::Widen,
            M::Cwd | M::Cdq | M::Cqo => Op::WidenPair,
            M::Xlatb => Op::Xlat,
            M::Bound => Op::Bound,
            M::Salc => Op::Salc,
            M::Clflush | M::Clflushopt | M::Clwb => Op::CacheLine,
            M::Rdtsc => Op::ReadTsc(false),
            M::Rdtscp => Op::ReadTsc(true),
            M::Rdrand => Op::Random(false),
            M::Rdseed => Op::Random(true),
            M::Jcxz | M::Jecxz | M::Jrcxz => self.near(Op::Loop(Loop::IfZero)),
            M::Loop => self.near(Op::Loop(Loop::Always)),
            M::Loope => self.near(Op::Loop(Loop::WhileEqual)),
            M::Loopne => self.near(Op::Loop(Loop::WhileNotEqual)),
            M::Ret => self.near(Op::Ret),
            M::Pusha | M::Pushad => Op::PushAll,
            M::Popa | M::Popad => Op::PopAll,
            M::Pushf | M::Pushfd | M::Pushfq => Op::PushFlags,
            M::Popf | M::Popfd | M::Popfq => Op::PopFlags,
            M::Enter => Op::Enter,
            M::Leave => Op::Leave,
            M::Clc => Op::Flag(FlagOp::ClearCarry),
            M::Stc => Op::Flag(FlagOp::SetCarry),
            M::Cmc => Op::Flag(FlagOp::ComplementCarry),
            M::Cld => Op::Flag(FlagOp::ClearDirection),
            M::Std => Op::Flag(FlagOp::SetDirection),
            M::Cli => Op::InterruptFlag(false),
            M::Sti => Op::InterruptFlag(true),
            M::Lahf => Op::Lahf,
            M::Sahf => Op::Sahf,
            M::Aaa => Op::Decimal(Decimal::Aaa),
            M::Aas => Op::Decimal(Decimal::Aas),
            M::Daa => Op::Decimal(Decimal::Daa),
            M::Das => Op::Decimal(Decimal::Das),
            M::Aam => Op::Decimal(Decimal::Aam),
            M::Aad => Op::Decimal(Decimal::Aad),
            M::Adcx => Op::AddCarry(false),
            M::Adox => Op::AddCarry(true),
            M::Crc32 => Op::Crc32,
            M::Andn => Op::Bmi(Bmi::Andn),
            M::Bextr => Op::Bmi(Bmi::Bextr),
            M::Blsi => Op::Bmi(Bmi::Blsi),
            M::Blsmsk => Op::Bmi(Bmi::Blsmsk),
            M::Blsr => Op::Bmi(Bmi::Blsr),
            M::Bzhi => Op::Bmi(Bmi::Bzhi),
            M::Pdep => Op::Bmi(Bmi::Pdep),
            M::Pext => Op::Bmi(Bmi::Pext),
            M::Mulx => Op::Bmi(Bmi::Mulx),
            M::Rorx => Op::Bmi(Bmi::Rorx),
            M::Sarx => Op::Bmi(Bmi::Sarx),
            M::Shlx => Op::Bmi(Bmi::Shlx),
            M::Shrx => Op::Bmi(Bmi::Shrx),
            M::Fninit => Op::X87(X87::Init),
            M::Fnclex => Op::X87(X87::ClearExceptions),
            M::Fnstsw => Op::X87(X87::StoreStatus),
            M::Fnstcw => Op::X87(X87::StoreControl),
            M::Fldcw => Op::X87(X87::LoadControl),
            M::Wait => Op::X87(X87::Wait),
            _ if matches!(
                insn.code(),
                Code::Movss_xmm_xmmm32
                    | Code::Movss_xmmm32_xmm
                    | Code::Movsd_xmm_xmmm64
                    | Code::Movsd_xmmm64_xmm
            ) =>
            {
                Op::MovVector(false)
            }
            _ => match (condition_user(insn.code()), self.unsupported()) {
                (Some(ConditionUser::Set), _) => Op::Setcc(condition),
                (Some(ConditionUser::Move), _) => Op::Cmovcc(condition),
                (None, _) if insn.is_jcc_short_or_near() => self.near(Op::Jcc(condition)),
                (None, reason) => Op::Unsupported(reason),
            },
        }
    }

    /// An XMM register on one side, memory on the other.
    fn moves_vector_memory(&self) -> bool {
        matches!(
            (self.operand(0), self.operand(1)),
            (Operand::Xmm(_), Operand::Mem) | (Operand::Mem, Operand::Xmm(_))
        )
    }

    /// AMD takes the operand-size prefix of a near branch in 64-bit mode, Intel ignores it.
    fn near(&self, op: Op) -> Op {
        if self.bitness == 64 && prefixes(64, self.bytes).contains(&0x66) {
            Op::Unsupported(Unsupported::Branch16)
        } else {
            op
        }
    }
}

enum ConditionUser {
    Set,
    Move,
}

fn condition_user(code: Code) -> Option<ConditionUser> {
    if (Code::Seto_rm8..=Code::Setg_rm8).contains(&code) {
        Some(ConditionUser::Set)
    } else if (Code::Cmovo_r16_rm16..=Code::Cmovg_r64_rm64).contains(&code) {
        Some(ConditionUser::Move)
    } else {
        None
    }
}

fn string_op(mnemonic: Mnemonic) -> Op {
    use Mnemonic as M;
    Op::String(match mnemonic {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => StringOp::Movs,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => StringOp::Stos,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => StringOp::Lods,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => StringOp::Scas,
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => StringOp::Cmps,
        M::Insb | M::Insw | M::Insd => StringOp::Ins,
        M::Outsb | M::Outsw | M::Outsd => StringOp::Outs,
        _ => return Op::Unsupported(Unsupported::Other),
    })
}

fn is_source_string(kind: OpKind) -> bool {
    matches!(kind, OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI)
}

fn is_string_operand(kind: OpKind) -> bool {
    string_address_size(kind).is_some()
}

fn string_address_size(kind: OpKind) -> Option<u8> {
    match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    }
}

pub(super) fn gpr(register: Register) -> Option<Gpr> {
    (register.is_gpr16() || register.is_gpr32() || register.is_gpr64())
        .then(|| Gpr::ALL[register.number() & 15])
}

fn register(register: Register) -> Operand {
    match register {
        Register::AH => Operand::High(Gpr::Rax),
        Register::CH => Operand::High(Gpr::Rcx),
        Register::DH => Operand::High(Gpr::Rdx),
        Register::BH => Operand::High(Gpr::Rbx),
        r if r.is_gpr8() => Operand::Reg(low_byte(r)),
        r if r.is_xmm() => Operand::Xmm(r.number() as u8),
        r if r.is_segment_register() => Operand::Seg(segment(r)),
        r => gpr(r).map_or(Operand::None, Operand::Reg),
    }
}

/// The register whose bits 7:0 an 8-bit register (not AH to BH) is.
fn low_byte(register: Register) -> Gpr {
    Gpr::ALL[register.full_register().number() & 15]
}

pub(super) fn segment(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}
