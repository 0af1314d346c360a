//! Real execution: runs one instruction on the host's processor, in 64-bit or 32-bit code, with given registers and
//! flags, and captures what it leaves. Its memory lies below 2 GiB, so that either code size reaches it.
#![allow(unsafe_code)] // writes machine code into an executable mapping and calls it

use core::arch::asm;
use core::ffi::c_void;

extern "C" {
    fn mmap(addr: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn munmap(addr: *mut c_void, len: usize) -> i32;
}

const READ_WRITE_EXECUTE: i32 = 7;
const PRIVATE_ANONYMOUS_32BIT: i32 = 0x02 | 0x20 | 0x40;

const CODE: usize = 0;
const STATE: usize = 0x1000;
const RAM: usize = 0x2000;
/// Bytes of memory the instruction may use.
pub(super) const RAM_LEN: usize = 0x2000;
const LEN: usize = RAM + RAM_LEN;

// Offsets in the state page.
const GPRS: usize = STATE;
const RFLAGS: usize = STATE + 0x80;
const HOST_RSP: usize = STATE + 0x88;
const LANDED: usize = STATE + 0x90;
const FAR_POINTER: usize = STATE + 0x98;
/// A stack for the 32-bit stub's own use ends here.
const STUB_STACK: usize = STATE + 0xff0;

// Linux's selectors.
const USER_CS32: u16 = 0x23;
const USER_DS: u16 = 0x2b;
const USER_CS64: u16 = 0x33;

/// Registers before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) gprs: [u64; 16],
    pub(super) rflags: u64,
    /// Set by [`Native::run`].
    pub(super) rip: u64,
}

/// The executable mapping.
pub(super) struct Native {
    base: *mut u8,
    bitness: u32,
    insn_at: usize,
    landing: usize,
}

struct Assembler<'a> {
    native: &'a mut Native,
    at: usize,
    wide: bool,
}

impl Assembler<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.native.poke(self.at, bytes);
        self.at += bytes.len();
        assert!(self.at < STATE);
    }

    /// An opcode with a ModRM memory operand at `target` (RIP-relative or absolute), followed by `immediate`.
    fn with_memory(&mut self, opcode: &[u8], reg: u8, target: usize, immediate: &[u8]) {
        self.bytes(opcode);
        self.bytes(&[(reg & 7) << 3 | 5]);
        let end = self.at + 4 + immediate.len();
        let displacement =
            if self.wide { target.wrapping_sub(end) as u32 } else { self.native.address(target) as u32 };
        self.bytes(&displacement.to_le_bytes());
        self.bytes(immediate);
    }

    /// `mov` between a register and memory: opcode 8B loads, 89 stores.
    fn mov(&mut self, opcode: u8, reg: u8, target: usize) {
        if self.wide {
            self.with_memory(&[0x48 | reg >> 3 << 2, opcode], reg, target, &[]);
        } else {
            self.with_memory(&[opcode], reg, target, &[]);
        }
    }
}

impl Native {
    /// A mapping for 64-bit or 32-bit code; `None` if the system does not let us have one.
    pub(super) fn new(bitness: u32) -> Option<Self> {
        // SAFETY: a new anonymous mapping touches no memory of ours.
        let base =
            unsafe { mmap(core::ptr::null_mut(), LEN, READ_WRITE_EXECUTE, PRIVATE_ANONYMOUS_32BIT, -1, 0) };
        if base as isize == -1 {
            return None;
        }
        Some(Self { base: base.cast(), bitness, insn_at: 0, landing: 0 })
    }

    fn address(&self, offset: usize) -> u64 {
        self.base as u64 + offset as u64
    }

    fn poke(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= LEN);
        // SAFETY: inside the mapping, which only this object uses.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) }
    }

    fn peek(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= LEN);
        // SAFETY: inside the mapping, which only this object uses.
        unsafe { core::ptr::copy_nonoverlapping(self.base.add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }

    fn peek_u64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.peek(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Linear address of the instruction's memory.
    pub(super) fn ram(&self) -> u64 {
        self.address(RAM)
    }

    /// Selectors of ES, CS, SS, DS, FS and GS while the instruction runs.
    pub(super) fn selectors(&self) -> [u16; 6] {
        let mut selectors = [0; 6];
        // SAFETY: moves from segment registers, into general registers.
        unsafe {
            asm!("mov {0:x}, es", "mov {1:x}, cs", "mov {2:x}, ss", "mov {3:x}, ds", "mov {4:x}, fs", "mov {5:x}, gs",
                 out(reg) selectors[0], out(reg) selectors[1], out(reg) selectors[2], out(reg) selectors[3],
                 out(reg) selectors[4], out(reg) selectors[5], options(nomem, nostack, preserves_flags));
        }
        if self.bitness == 32 {
            (selectors[0], selectors[1], selectors[3]) = (USER_DS, USER_CS32, USER_DS);
        }
        selectors
    }

    /// Writes the code around `insn`. Returns where it will be executed and where it may branch to.
    pub(super) fn prepare(&mut self, insn: &[u8]) -> (u64, u64) {
        let wide = self.bitness == 64;
        let mut asm = Assembler { native: self, at: CODE, wide: true };
        asm.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]); // push rbx, rbp, r12 to r15
        asm.mov(0x89, 4, HOST_RSP);
        if wide {
            asm.with_memory(&[0xff], 6, RFLAGS, &[]); // push
            asm.bytes(&[0x9d]); // popfq
        } else {
            asm.bytes(&[0xb8, USER_DS as u8, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0]); // mov eax; mov ds, es
            asm.with_memory(&[0xff], 5, FAR_POINTER, &[]); // jmp far
            let target = asm.native.address(asm.at) as u32;
            let mut pointer = [0; 6];
            pointer[..4].copy_from_slice(&target.to_le_bytes());
            pointer[4..].copy_from_slice(&USER_CS32.to_le_bytes());
            asm.native.poke(FAR_POINTER, &pointer);
            asm.wide = false;
            let stack = asm.native.address(STUB_STACK) as u32;
            asm.bytes(&[0xbc]); // mov esp
            asm.bytes(&stack.to_le_bytes());
            asm.with_memory(&[0xff], 6, RFLAGS, &[]);
            asm.bytes(&[0x9d]);
        }
        let registers = if wide { 16 } else { 8 };
        for reg in 0..registers {
            asm.mov(0x8b, reg, GPRS + 8 * usize::from(reg));
        }
        let insn_at = asm.at;
        asm.bytes(insn);
        asm.bytes(&[0xe9]); // jmp over the landing pad
        asm.bytes(&7_u32.to_le_bytes());
        let landing = asm.at;
        asm.with_memory(&[0xc6], 0, LANDED, &[1]); // mov byte, 1
        assert_eq!(asm.at, landing + 7);
        for reg in 0..registers {
            asm.mov(0x89, reg, GPRS + 8 * usize::from(reg));
        }
        if wide {
            asm.mov(0x8b, 4, HOST_RSP);
            asm.bytes(&[0x9c]); // pushfq
            asm.with_memory(&[0x8f], 0, RFLAGS, &[]); // pop
        } else {
            let stack = asm.native.address(STUB_STACK) as u32;
            asm.bytes(&[0xbc]);
            asm.bytes(&stack.to_le_bytes());
            asm.bytes(&[0x9c]);
            asm.with_memory(&[0x8f], 0, RFLAGS, &[]);
            asm.bytes(&[0xea]); // jmp far
            let target = asm.native.address(asm.at + 6) as u32;
            asm.bytes(&target.to_le_bytes());
            asm.bytes(&USER_CS64.to_le_bytes());
            asm.wide = true;
            asm.mov(0x8b, 4, HOST_RSP);
            asm.bytes(&[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0]); // xor eax, eax; mov ds, es
        }
        asm.bytes(&[0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]); // cld; pop; ret
        self.insn_at = insn_at;
        self.landing = landing;
        (self.address(insn_at), self.address(landing))
    }

    /// Executes the instruction of [`Self::prepare`], which was `len` bytes long.
    ///
    /// The instruction must not fault, must touch no memory but `ram` (RSP included) and may branch only to the
    /// landing place.
    pub(super) fn run(&mut self, len: usize, registers: &mut Registers, ram: &mut [u8]) {
        self.poke(RAM, &ram[..RAM_LEN]);
        for (index, gpr) in registers.gprs.iter().enumerate() {
            self.poke(GPRS + 8 * index, &gpr.to_le_bytes());
        }
        self.poke(RFLAGS, &registers.rflags.to_le_bytes());
        self.poke(LANDED, &[0]);
        // SAFETY: the code was written by `prepare` and follows the C calling convention; what the instruction
        // itself does is the caller's promise. Legacy stores to code are seen by this thread's next jump to it.
        unsafe {
            asm!(
                "call {code}",
                code = in(reg) self.base.add(CODE),
                clobber_abi("C"),
            );
        }
        for (index, gpr) in registers.gprs.iter_mut().enumerate() {
            *gpr = self.peek_u64(GPRS + 8 * index);
        }
        registers.rflags = self.peek_u64(RFLAGS);
        if self.bitness == 32 {
            registers.rflags &= 0xffff_ffff;
        }
        let landed = self.peek_u64(LANDED) & 0xff != 0;
        registers.rip = self.address(if landed { self.landing } else { self.insn_at + len });
        self.peek(RAM, &mut ram[..RAM_LEN]);
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`; nothing refers to it any more.
        unsafe { munmap(self.base.cast(), LEN) };
    }
}
