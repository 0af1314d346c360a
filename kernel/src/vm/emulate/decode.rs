//! The compact decoded form of an instruction.
use super::flags::Shift;

/// Longest instruction in bytes. AMD APM vol. 3, 1.1.
pub const MAX_LEN: usize = 15;

/// A general register, by its number in instruction encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// All sixteen, in order of their numbers.
    #[rustfmt::skip]
    pub const ALL: [Self; 16] = [
        Self::Rax, Self::Rcx, Self::Rdx, Self::Rbx, Self::Rsp, Self::Rbp, Self::Rsi, Self::Rdi,
        Self::R8, Self::R9, Self::R10, Self::R11, Self::R12, Self::R13, Self::R14, Self::R15,
    ];
}

/// A segment register, by its number in instruction encodings, and the task register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
    /// Task register: base and limit of the TSS, for the I/O permission map.
    Tr,
}

/// Why bytes are not an instruction that can be emulated or skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// No instruction begins with these bytes: the processor raises #UD.
    Invalid,
    /// No instruction is that long: the processor raises #GP(0).
    TooLong,
    /// The instruction goes on past the bytes given; fetching the next one may fault.
    Truncated,
    /// Valid on some processors, but unknown to the decoder (EVEX, XOP, 3DNow!).
    Unknown,
}

/// Two-operand arithmetic. The discriminant is the /reg field of opcodes 80 to 83.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary {
    Inc,
    Dec,
    Not,
    Neg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitOp {
    Test,
    Set,
    Reset,
    Complement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StringOp {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

/// Searches for a bit, and its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    Bsf,
    Bsr,
    Tzcnt,
    Lzcnt,
    Popcnt,
}

/// One status or direction flag set by an instruction of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlagOp {
    ClearCarry,
    SetCarry,
    ComplementCarry,
    ClearDirection,
    SetDirection,
}

/// Adjustments of decimal numbers, packed and unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decimal {
    Aaa,
    Aas,
    Daa,
    Das,
    Aam,
    Aad,
}

/// Branches that look at the count register; all but JCXZ decrement it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loop {
    /// JCXZ, JECXZ, JRCXZ.
    IfZero,
    Always,
    WhileEqual,
    WhileNotEqual,
}

/// BMI1 and BMI2: general-register instructions with a VEX prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bmi {
    Andn,
    Bextr,
    Blsi,
    Blsmsk,
    Blsr,
    Bzhi,
    Pdep,
    Pext,
    Mulx,
    Rorx,
    Sarx,
    Shlx,
    Shrx,
}

/// The x87 instructions that reset the unit and move its control and status words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum X87 {
    Init,
    ClearExceptions,
    StoreStatus,
    StoreControl,
    LoadControl,
    Wait,
}

/// System instructions and far transfers. Operands are in [`DecodedInsn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum System {
    /// MOV and POP to a segment register.
    LoadSegment,
    PopSegment,
    /// LDS, LES, LFS, LGS, LSS; the segment register is the third operand.
    LoadFar,
    JumpFar,
    CallFar,
    ReturnFar,
    InterruptReturn,
    /// INT n, INT3, INTO, INT1.
    Interrupt,
    Breakpoint,
    Overflow,
    DebugTrap,
    /// SGDT and LGDT, or (true) SIDT and LIDT.
    StoreTable(bool),
    LoadTable(bool),
    /// SLDT or (true) STR.
    StoreSelector(bool),
    LoadLdt,
    LoadTask,
    /// SMSW and LMSW.
    StoreStatus,
    LoadStatus,
    ClearTaskSwitched,
    ReadControl,
    WriteControl,
    ReadDebug,
    WriteDebug,
    /// INVLPG and INVPCID.
    InvalidatePage,
    InvalidateContext,
    CacheFlush,
    Halt,
    Cpuid,
    ReadMsr,
    WriteMsr,
    ReadXcr,
    WriteXcr,
    SwapGs,
    Sysenter,
    Sysexit,
    Syscall,
    Sysret,
    /// LAR, LSL, VERR or (true) VERW, ARPL.
    Rights,
    Limit,
    Verify(bool),
    AdjustRpl,
    /// #GP(0).
    Refused,
    /// #UD.
    Undefined,
}

/// What an instruction does. Operands are in [`DecodedInsn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Mov,
    Movzx,
    Movsx,
    Movbe,
    Alu(Alu),
    Test,
    Unary(Unary),
    Shift(Shift),
    /// SHLD (true) or SHRD.
    DoubleShift(bool),
    Bit(BitOp),
    Scan(Scan),
    Xchg,
    Xadd,
    Cmpxchg,
    /// CMPXCHG8B or, with 16-byte operand, CMPXCHG16B.
    CmpxchgPair,
    Setcc(u8),
    Cmovcc(u8),
    /// MUL (false) or one-operand IMUL into the accumulator pair.
    MulWide(bool),
    /// Two- and three-operand IMUL.
    Imul,
    /// DIV (false) or IDIV of the accumulator pair.
    Div(bool),
    Push,
    Pop,
    Call,
    Jmp,
    String(StringOp),
    In,
    Out,
    /// SSE move between a register and memory; true: the memory operand must be aligned.
    MovVector(bool),
    /// NOP and its reserved forms (prefetches, ENDBR), PAUSE, fences.
    Nop,
    Lea,
    Bswap,
    /// CBW, CWDE, CDQE: the accumulator's lower half sign-extended.
    Widen,
    /// CWD, CDQ, CQO: the accumulator sign-extended into RDX.
    WidenPair,
    Xlat,
    Bound,
    Salc,
    /// CLFLUSH, CLFLUSHOPT, CLWB.
    CacheLine,
    /// RDTSC, or RDTSCP (true).
    ReadTsc(bool),
    /// RDRAND, or RDSEED (true).
    Random(bool),
    Jcc(u8),
    Loop(Loop),
    Ret,
    PushAll,
    PopAll,
    PushFlags,
    PopFlags,
    /// Bytes to reserve in bits 15:0 of the immediate, nesting level above.
    Enter,
    Leave,
    Flag(FlagOp),
    /// CLI (false) or STI.
    InterruptFlag(bool),
    Lahf,
    Sahf,
    Decimal(Decimal),
    /// ADCX (false) or ADOX.
    AddCarry(bool),
    Crc32,
    Bmi(Bmi),
    X87(X87),
    System(System),
    Unsupported(Unsupported),
}

/// Instructions that decode, so that they can be skipped, but are not emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsupported {
    Other,
    Vector,
    /// A vector instruction whose encoding real and virtual-8086 mode do not have.
    Vex,
    Branch16,
}

impl Unsupported {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Other => "instruction outside the emulated set",
            Self::Vector | Self::Vex => "vector or x87 instruction",
            Self::Branch16 => "near branch with operand-size prefix in 64-bit mode, where vendors differ",
        }
    }
}

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    None,
    Reg(Gpr),
    /// AH, CH, DH or BH: bits 15:8 of RAX to RBX.
    High(Gpr),
    Xmm(u8),
    /// A segment register's selector.
    Seg(Seg),
    Mem,
    Imm,
    /// Target of a near branch: the immediate is its distance from this instruction.
    Near,
    /// Control and debug registers.
    Control(u8),
    Debug(u8),
}

/// What is added to index and displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    None,
    Reg(Gpr),
    /// RIP of the instruction itself; its length is part of the displacement.
    Rip,
}

/// Repeat prefix of a string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    Once,
    /// F3: REP, or REPE of CMPS and SCAS.
    Equal,
    /// F2: REPNE; of other string instructions the same as REP.
    NotEqual,
}

/// The one memory operand that is addressed by ModRM or moffs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) base: Base,
    pub(super) index: Option<Gpr>,
    /// log2 of the index's scale.
    pub(super) scale: u8,
    /// Address size in bytes, 2, 4 or 8: offsets wrap there. Of LOOP and JCXZ the size of the count.
    pub(super) size: u8,
    /// Effective segment, override applied.
    pub(super) seg: Seg,
    pub(super) displacement: u64,
}

/// An instruction in the form that is cached and executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedInsn {
    pub(super) imm: u64,
    pub(super) mem: Address,
    pub(super) op: Op,
    pub(super) dst: Operand,
    pub(super) src: Operand,
    /// Shift count of SHLD and SHRD, multiplier of three-operand IMUL, last operand of BMI instructions.
    pub(super) third: Operand,
    pub(super) len: u8,
    /// Bytes of the destination, or of what is compared, pushed or branched to.
    pub(super) size: u8,
    /// Bytes of the source where it differs (MOVZX).
    pub(super) src_size: u8,
    pub(super) repeat: Repeat,
    /// LOCK prefix, or XCHG with memory.
    pub(super) locked: bool,
    /// Touches exactly one piece of memory.
    pub(super) sole: bool,
}

impl DecodedInsn {
    /// What an unused cache entry holds.
    pub(super) const EMPTY: Self = Self {
        imm: 0,
        mem: Address { base: Base::None, index: None, scale: 0, size: 8, seg: Seg::Ds, displacement: 0 },
        op: Op::Unsupported(Unsupported::Other),
        dst: Operand::None,
        src: Operand::None,
        third: Operand::None,
        len: 1,
        size: 0,
        src_size: 0,
        repeat: Repeat::Once,
        locked: false,
        sole: false,
    };

    /// Length in bytes, 1 to 15.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether a fault may find iterations committed.
    #[cfg(test)]
    pub(super) fn repeats(&self) -> bool {
        self.repeat != Repeat::Once && matches!(self.op, Op::String(_))
    }

    /// Whether it may touch descriptor tables, stacks and task states beside its operand.
    #[cfg(test)]
    pub(super) fn is_system(&self) -> bool {
        matches!(self.op, Op::System(_))
    }

    /// Whether the operand is found by a bit offset in a register.
    #[cfg(test)]
    pub(super) fn has_bit_offset(&self) -> bool {
        matches!(self.op, Op::Bit(_)) && self.src != Operand::Imm
    }
}
