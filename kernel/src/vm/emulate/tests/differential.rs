//! The emulator against the host's processor: the same bytes, registers, flags and memory, the same result.
//! Flags that the manuals leave undefined for an instruction are not compared.
use super::fake::FakeCpu;
use super::hostile::Random;
use super::native::{Native, Registers, RAM_LEN};
use crate::vm::emulate::flags::{AF, CF, DF, ID, IF, OF, PF, SF, STATUS, ZF};
use crate::vm::emulate::{Emulator, Exception, Gpr, Mode, Outcome};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic as M, OpKind, Register};

/// Where in RAM memory operands lie; bit offsets reach a little to either side.
const OPERANDS: usize = 0x800;

/// Immediate behind the operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Imm {
    No,
    Byte,
    /// 16 or 32 bits, by operand size.
    Full,
}

/// An instruction with a ModRM operand (moffs apart), without its prefixes.
#[derive(Clone, Copy)]
struct Form {
    /// A 66, F2 or F3 that is part of the opcode.
    prefix: Option<u8>,
    /// Opcode map and implied prefix (pp) of a VEX encoding with random operands.
    vex: Option<(u8, u8)>,
    opcode: &'static [u8],
    /// The reg field is part of the opcode.
    digit: Option<u8>,
    imm: Imm,
    /// LOCK is allowed.
    lock: bool,
    /// A register may stand in place of memory.
    register: bool,
    /// Not in 32-bit code.
    only64: bool,
}

const fn form(opcode: &'static [u8]) -> Form {
    Form {
        prefix: None,
        vex: None,
        opcode,
        digit: None,
        imm: Imm::No,
        lock: false,
        register: true,
        only64: false,
    }
}

impl Form {
    const fn digit(self, digit: u8) -> Self {
        Self { digit: Some(digit), ..self }
    }
    const fn imm8(self) -> Self {
        Self { imm: Imm::Byte, ..self }
    }
    const fn imm(self) -> Self {
        Self { imm: Imm::Full, ..self }
    }
    const fn lock(self) -> Self {
        Self { lock: true, ..self }
    }
    const fn memory(self) -> Self {
        Self { register: false, ..self }
    }
    const fn repeat(self) -> Self {
        self.prefix(0xf3)
    }
    const fn prefix(self, prefix: u8) -> Self {
        Self { prefix: Some(prefix), ..self }
    }
    const fn vex(self, map: u8, pp: u8) -> Self {
        Self { vex: Some((map, pp)), ..self }
    }
}

static BYTES: [[u8; 1]; 256] = {
    let mut all = [[0; 1]; 256];
    let mut byte = 0;
    while byte < 256 {
        all[byte] = [byte as u8];
        byte += 1;
    }
    all
};

static SECOND: [[u8; 2]; 256] = {
    let mut all = [[0x0f, 0]; 256];
    let mut byte = 0;
    while byte < 256 {
        all[byte][1] = byte as u8;
        byte += 1;
    }
    all
};

fn one(opcode: u8) -> Form {
    form(&BYTES[usize::from(opcode)])
}

fn two(opcode: u8) -> Form {
    form(&SECOND[usize::from(opcode)])
}

fn moves() -> Vec<Form> {
    let mut forms = vec![one(0x88), one(0x89), one(0x8a), one(0x8b)];
    forms.extend([one(0xc6).digit(0).imm8(), one(0xc7).digit(0).imm()]);
    forms.extend([two(0xb6), two(0xb7), two(0xbe), two(0xbf), two(0xc3).memory()]);
    forms.push(Form { only64: true, ..one(0x63) });
    if std::is_x86_feature_detected!("movbe") {
        forms.extend([form(&[0x0f, 0x38, 0xf0]).memory(), form(&[0x0f, 0x38, 0xf1]).memory()]);
    }
    for condition in 0..16 {
        forms.extend([two(0x90 + condition).digit(0), two(0x40 + condition)]);
    }
    forms
}

fn arithmetic() -> Vec<Form> {
    let mut forms = vec![one(0x84), one(0x85), one(0xf6).digit(0).imm8(), one(0xf7).digit(0).imm()];
    for op in 0..8 {
        let lockable = |form: Form| if op == 7 { form } else { form.lock() };
        forms.extend([lockable(one(8 * op)), lockable(one(8 * op + 1)), one(8 * op + 2), one(8 * op + 3)]);
        forms.push(lockable(one(0x80).digit(op).imm8()));
        forms.push(lockable(one(0x81).digit(op).imm()));
        forms.push(lockable(one(0x83).digit(op).imm8()));
    }
    for opcode in [0xf6, 0xf7] {
        forms.extend([one(opcode).digit(2).lock(), one(opcode).digit(3).lock()]);
        forms.extend((4..8).map(|digit| one(opcode).digit(digit)));
    }
    for opcode in [0xfe, 0xff] {
        forms.extend([one(opcode).digit(0).lock(), one(opcode).digit(1).lock()]);
    }
    forms.extend([two(0xaf), one(0x69).imm(), one(0x6b).imm8()]);
    forms
}

fn shifts_and_bits() -> Vec<Form> {
    let mut forms = Vec::new();
    for digit in 0..8 {
        forms.extend([one(0xc0).digit(digit).imm8(), one(0xc1).digit(digit).imm8()]);
        forms.extend([0xd0, 0xd1, 0xd2, 0xd3].map(|opcode| one(opcode).digit(digit)));
    }
    forms.extend([two(0xa4).imm8(), two(0xa5), two(0xac).imm8(), two(0xad)]);
    forms.extend([two(0xa3), two(0xab).lock(), two(0xb3).lock(), two(0xbb).lock()]);
    forms.push(two(0xba).digit(4).imm8());
    forms.extend((5..8).map(|digit| two(0xba).digit(digit).imm8().lock()));
    forms.extend([two(0xbc), two(0xbd)]);
    if std::is_x86_feature_detected!("popcnt") {
        forms.push(two(0xb8).repeat());
    }
    if std::is_x86_feature_detected!("bmi1") && std::is_x86_feature_detected!("lzcnt") {
        forms.extend([two(0xbc).repeat(), two(0xbd).repeat()]);
    }
    forms
}

fn exchanges() -> Vec<Form> {
    vec![
        one(0x86).lock(),
        one(0x87).lock(),
        two(0xb0).lock(),
        two(0xb1).lock(),
        two(0xc0).lock(),
        two(0xc1).lock(),
        two(0xc7).digit(1).lock().memory(),
    ]
}

/// BMI, ADX and CRC32, as far as this processor has them.
fn extensions() -> Vec<Form> {
    let mut forms = Vec::new();
    if std::is_x86_feature_detected!("bmi1") {
        forms.extend([one(0xf2).vex(2, 0), one(0xf7).vex(2, 0)]);
        forms.extend((1..4).map(|digit| one(0xf3).digit(digit).vex(2, 0)));
    }
    if std::is_x86_feature_detected!("bmi2") {
        forms.extend([one(0xf5).vex(2, 0), one(0xf5).vex(2, 3), one(0xf5).vex(2, 2), one(0xf6).vex(2, 3)]);
        forms.extend((1..4).map(|pp| one(0xf7).vex(2, pp)));
        forms.push(one(0xf0).imm8().vex(3, 3));
    }
    if std::is_x86_feature_detected!("adx") {
        let carry = form(&[0x0f, 0x38, 0xf6]);
        forms.extend([carry.prefix(0x66), carry.prefix(0xf3)]);
    }
    if std::is_x86_feature_detected!("sse4.2") {
        forms.push(form(&[0x0f, 0x38, 0xf0]).prefix(0xf2));
        forms.push(form(&[0x0f, 0x38, 0xf1]).prefix(0xf2));
    }
    forms
}

/// LEA, reads of segment registers, NOPs with operands, prefetches, cache lines.
fn addresses() -> Vec<Form> {
    let mut forms = vec![one(0x8d).memory(), two(0x1f).digit(0), two(0x18).digit(1).memory()];
    forms.extend([two(0x1e).digit(5), two(0x0d).digit(1).memory(), two(0xae).digit(7).memory()]);
    forms.extend((0..6).map(|digit| one(0x8c).digit(digit)));
    forms
}

fn stack_and_branches() -> Vec<Form> {
    vec![one(0xff).digit(6), one(0x8f).digit(0), one(0xff).digit(2).memory(), one(0xff).digit(4).memory()]
}

/// A value that is often near an edge.
fn value(random: &mut Random) -> u64 {
    let edges = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
    match random.below(6) {
        0 => edges[random.below(edges.len() as u64) as usize],
        1 => !edges[random.below(edges.len() as u64) as usize],
        2 => 1 << random.below(64),
        3 => random.below(256),
        _ => random.next(),
    }
}

struct Bench {
    native: Native,
    emulator: Emulator,
    bitness: u32,
    random: Random,
    executed: u32,
}

/// Everything an instruction starts from.
struct Case {
    bytes: Vec<u8>,
    insn: Instruction,
    registers: Registers,
    ram: Vec<u8>,
}

impl Bench {
    fn new(bitness: u32, seed: u64) -> Option<Self> {
        let Some(native) = Native::new(bitness) else {
            eprintln!("no executable memory below 2 GiB here: nothing compared");
            return None;
        };
        let emulator = Emulator::new().unwrap();
        Some(Self { native, emulator, bitness, random: Random::new(seed), executed: 0 })
    }

    fn mode(&self) -> Mode {
        if self.bitness == 64 {
            Mode::Long64
        } else {
            Mode::Protected32
        }
    }

    fn decode(&self, bytes: &[u8], ip: u64) -> Option<Instruction> {
        let mut decoder = Decoder::with_ip(self.bitness, bytes, ip, DecoderOptions::NONE);
        let insn = decoder.decode();
        (!insn.is_invalid()).then_some(insn)
    }

    fn registers(&mut self) -> Registers {
        let mut gprs = [0; 16];
        for gpr in &mut gprs {
            *gpr = value(&mut self.random);
        }
        gprs[Gpr::Rsp as usize] = self.native.ram() + 0x1800 + self.random.below(64) * 8;
        let mut rflags = 0x202 | self.random.next() & STATUS;
        if self.random.chance(3) {
            rflags |= DF;
        }
        if self.bitness == 32 {
            gprs[8..].fill(0);
            for gpr in &mut gprs {
                *gpr &= 0xffff_ffff;
            }
        }
        Registers { gprs, rflags, rip: 0 }
    }

    fn ram(&mut self) -> Vec<u8> {
        let mut ram = vec![0; RAM_LEN];
        for quadword in ram[OPERANDS - 0x180..OPERANDS + 0x280].chunks_exact_mut(8) {
            quadword.copy_from_slice(&value(&mut self.random).to_le_bytes());
        }
        ram
    }

    /// Random bytes of `form` and a state in which its memory operand lies in RAM. `None`: a combination that cannot be
    /// executed here.
    fn case(&mut self, form: Form) -> Option<Case> {
        let random = &mut self.random;
        let wide = self.bitness == 64;
        let mut bytes = Vec::new();
        let operand16 = form.vex.is_none() && random.chance(4);
        if operand16 {
            bytes.push(0x66);
        }
        if wide && random.chance(6) {
            bytes.push(0x67);
        }
        if random.chance(8) {
            // Ignored in 64-bit mode, flat in 32-bit code; there CS (the last) is not writable.
            bytes.push([0x36, 0x3e, 0x26, 0x2e][random.below(if wide { 4 } else { 3 }) as usize]);
        }
        let lock = form.lock && random.chance(2);
        if lock {
            bytes.push(0xf0);
        }
        bytes.extend(form.prefix);
        if let Some((map, pp)) = form.vex {
            // R, X and B are inverted; outside 64-bit mode R and X are what makes this VEX and not LES.
            let extended = if wide { random.next() as u8 & 0xe0 } else { 0xe0 };
            let vvvv = random.below(if wide { 16 } else { 8 }) as u8 | if wide { 0 } else { 8 };
            let w = if wide { random.next() as u8 & 0x80 } else { 0 };
            bytes.extend([0xc4, extended | map, w | vvvv << 3 | pp]);
        } else if wide && random.chance(2) {
            bytes.push(0x40 | random.below(16) as u8);
        }
        bytes.extend(form.opcode);
        let register = form.register && !lock && random.chance(8);
        let mode = if register { 3 } else { random.below(3) as u8 };
        let reg = form.digit.unwrap_or(random.below(8) as u8);
        let rm = random.below(8) as u8;
        bytes.push(mode << 6 | reg << 3 | rm);
        let mut sib = 0;
        if mode != 3 && rm == 4 {
            sib = random.next() as u8;
            bytes.push(sib);
        }
        let displacement = match mode {
            0 if rm == 5 || (rm == 4 && sib & 7 == 5) => 4,
            1 => 1,
            2 => 4,
            _ => 0,
        };
        bytes.extend(&random.next().to_le_bytes()[..displacement]);
        match form.imm {
            Imm::No => {}
            Imm::Byte => bytes.push(value(random) as u8),
            Imm::Full => {
                // Enough for either size; cut to what the decoder takes.
                bytes.extend(&value(random).to_le_bytes()[..4]);
            }
        }
        self.place(bytes)
    }

    /// Gives the operand's registers and displacement values that lead into RAM.
    fn place(&mut self, mut bytes: Vec<u8>) -> Option<Case> {
        let len = self.decode(&bytes, 0)?.len();
        bytes.truncate(len);
        let (ip, _) = self.native.prepare(&bytes);
        let mut decoder = Decoder::with_ip(self.bitness, &bytes, ip, DecoderOptions::NONE);
        let insn = decoder.decode();
        let offsets = decoder.get_constant_offsets(&insn);
        let mut registers = self.registers();
        let ram = self.ram();
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        // RSP always points to the stack: it is nobody's operand.
        if (0..insn.op_count()).any(|i| {
            insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == Register::RSP
        }) {
            return None;
        }
        let bit_offset = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
            && memory
            && insn.op_kind(1) == OpKind::Register;
        if bit_offset {
            let index = insn.op1_register();
            let gpr = &mut registers.gprs[index.number() & 15];
            let near = self.random.below(0x1000).wrapping_sub(0x800);
            *gpr = match index.size() {
                2 => *gpr & !0xffff | near & 0xffff,
                4 => *gpr & !0xffff_ffff | near & 0xffff_ffff,
                _ => near,
            };
        }
        if memory {
            let size = insn.memory_size().size() as u64;
            let mut target = self.native.ram() + OPERANDS as u64 + self.random.below(0x100);
            if insn.has_lock_prefix() || size == 16 || insn.mnemonic() == M::Xchg {
                target &= !15;
                target += self.random.below(16) / size * size;
            }
            let (base, index) = (insn.memory_base(), insn.memory_index());
            let number = |r: Register| r.number() & 15;
            let width = match (base, index) {
                (Register::None, Register::None) => insn.memory_displ_size() as usize,
                (Register::None, register) | (register, _) => register.size(),
            };
            let is_ip = matches!(base, Register::RIP | Register::EIP);
            // A base or index that is also the bit offset cannot be chosen twice. RSP as base stays what it is.
            if bit_offset
                && [base, index]
                    .iter()
                    .any(|r| *r != Register::None && number(*r) == number(insn.op1_register()) && !is_ip)
            {
                return None;
            }
            if index != Register::None {
                let gpr = &mut registers.gprs[number(index)];
                *gpr = if self.random.chance(2) {
                    self.random.below(0x40)
                } else {
                    self.random.below(0x40).wrapping_neg()
                };
                if width == 4 {
                    *gpr &= 0xffff_ffff;
                }
            }
            let indexed = if index == Register::None {
                0
            } else {
                registers.gprs[number(index)].wrapping_mul(insn.memory_index_scale().into())
            };
            let fixed = match base {
                Register::None => Some(indexed),
                _ if is_ip => Some(insn.next_ip()),
                Register::RSP | Register::ESP => Some(indexed.wrapping_add(registers.gprs[4])),
                _ if number(base) == number(index) && index != Register::None => {
                    Some(indexed.wrapping_add(registers.gprs[number(index)]))
                }
                _ => None,
            };
            if let Some(fixed) = fixed {
                // Only a displacement of 32 bits can lead into RAM.
                let at = offsets.displacement_offset();
                if offsets.displacement_size() < 4 {
                    // Unless the stack pointer does.
                    if !matches!(base, Register::RSP | Register::ESP) || index != Register::None {
                        return None;
                    }
                    if size > 8 {
                        return None;
                    }
                } else {
                    let displacement = target.wrapping_sub(fixed);
                    let len = offsets.displacement_size();
                    bytes[at..at + len].copy_from_slice(&displacement.to_le_bytes()[..len]);
                }
            } else {
                let displacement = insn.memory_displacement64();
                let mut base_value = target.wrapping_sub(indexed).wrapping_sub(displacement);
                if width == 4 {
                    base_value &= 0xffff_ffff;
                    if self.bitness == 64 {
                        base_value |= self.random.next() << 32;
                    }
                }
                registers.gprs[number(base)] = base_value;
            }
            if width == 4 && self.bitness == 64 && index != Register::None && number(base) != number(index) {
                registers.gprs[number(index)] |= self.random.next() << 32;
            }
        }
        let insn = self.decode(&bytes, ip)?;
        Some(Case { bytes, insn, registers, ram })
    }

    /// Linear address of the memory operand, computed by the decoder's own rules.
    fn operand(&self, case: &Case, operand: u32) -> Option<u64> {
        let address = case.insn.virtual_address(operand, 0, |register, _, _| {
            let full = case.registers.gprs.get(register.full_register().number());
            match register {
                r if r.is_segment_register() => Some(0),
                Register::RIP | Register::EIP => Some(0),
                r if r.is_gpr32() => full.map(|v| v & 0xffff_ffff),
                _ => full.copied(),
            }
        })?;
        Some(if self.bitness == 32 { address & 0xffff_ffff } else { address })
    }

    /// Runs a case on both and compares. False: it raises #DE and so cannot run natively.
    fn compare(&mut self, case: Case) -> bool {
        let Case { bytes, insn, registers, ram } = case;
        let (rip, _) = self.native.prepare(&bytes);
        let mut cpu = FakeCpu::new(self.mode());
        cpu.base = self.native.ram();
        cpu.device = 0..0;
        cpu.cpl = 3;
        cpu.gprs = registers.gprs;
        cpu.rflags = registers.rflags;
        cpu.rip = rip;
        cpu.ram.clone_from(&ram);
        for (segment, selector) in cpu.segments.iter_mut().zip(self.native.selectors()) {
            segment.selector = selector;
        }
        let outcome = self.emulator.emulate(&mut cpu, &bytes);
        let context = || {
            format!("{:?} {bytes:02x?}\nfrom {:x?} flags {:x}", insn.code(), registers.gprs, registers.rflags)
        };
        if outcome == Outcome::Exception(Exception::DIVIDE) && matches!(insn.mnemonic(), M::Div | M::Idiv) {
            return false;
        }
        if outcome == Outcome::Exception(Exception::BOUND_RANGE) && insn.mnemonic() == M::Bound {
            return false;
        }
        assert_eq!(outcome, Outcome::Done { trap: false }, "{}", context());
        let (start, end) = (cpu.base, cpu.base + RAM_LEN as u64);
        for (_, linear, size) in cpu.touched() {
            assert!(linear >= start && linear + u64::from(size) <= end, "outside RAM: {}", context());
        }

        let mut after = registers.clone();
        let mut after_ram = ram.clone();
        self.native.run(bytes.len(), &mut after, &mut after_ram);
        assert_eq!(
            cpu.gprs,
            after.gprs,
            "registers\n left emulated {:x?}\nright real {:x?}\n{}",
            cpu.gprs,
            after.gprs,
            context()
        );
        assert_eq!(cpu.rip, after.rip, "rip: {}", context());
        if cpu.ram != after_ram {
            let at = (0..RAM_LEN).find(|&at| cpu.ram[at] != after_ram[at]).unwrap_or(0);
            let range = at & !7..(at & !7) + 8;
            panic!(
                "memory at {at:#x}: {:02x?} != {:02x?}, {}",
                &cpu.ram[range.clone()],
                &after_ram[range],
                context()
            );
        }
        let mask = (STATUS | DF | IF | ID) & !undefined(&insn, &registers);
        assert_eq!(cpu.rflags & mask, after.rflags & mask, "flags: {}", context());
        self.executed += 1;
        true
    }

    fn forms(&mut self, forms: &[Form], rounds: u32) {
        for _ in 0..rounds {
            for form in forms {
                if form.only64 && self.bitness != 64 {
                    continue;
                }
                let Some(mut case) = self.case(*form) else { continue };
                if self.adjust(&mut case) {
                    self.compare(case);
                }
            }
        }
    }

    /// Makes rare outcomes likely and impossible ones absent. False: leave the case out.
    fn adjust(&mut self, case: &mut Case) -> bool {
        let size = case.insn.memory_size().size();
        let memory = case.insn.op0_kind() == OpKind::Memory;
        let at = self.operand(case, 0).filter(|_| memory).map(|linear| (linear - self.native.ram()) as usize);
        match (case.insn.mnemonic(), at) {
            (M::Call | M::Jmp, Some(at)) => {
                if case.bytes.contains(&0x66) {
                    return false; // vendors differ in 64-bit mode; IP would be cut in 32-bit code
                }
                let (_, landing) = self.native.prepare(&case.bytes);
                case.ram[at..at + 8].copy_from_slice(&landing.to_le_bytes());
            }
            (M::Cmpxchg, Some(at)) if self.random.chance(2) => {
                let gpr = case.registers.gprs[0].to_le_bytes();
                case.ram[at..at + size].copy_from_slice(&gpr[..size]);
            }
            (M::Cmpxchg8b, Some(at)) if self.random.chance(2) => {
                case.ram[at..at + 4].copy_from_slice(&case.registers.gprs[0].to_le_bytes()[..4]);
                case.ram[at + 4..at + 8].copy_from_slice(&case.registers.gprs[2].to_le_bytes()[..4]);
            }
            (M::Cmpxchg16b, Some(at)) if self.random.chance(2) => {
                case.ram[at..at + 8].copy_from_slice(&case.registers.gprs[0].to_le_bytes());
                case.ram[at + 8..at + 16].copy_from_slice(&case.registers.gprs[2].to_le_bytes());
            }
            (M::Bound, _) => {
                // Between zero and a large bound, more often than not.
                if let Some(at) = self.operand(case, 1).map(|linear| (linear - self.native.ram()) as usize) {
                    let size = size / 2;
                    case.ram[at..at + size].copy_from_slice(&0_u64.to_le_bytes()[..size]);
                    case.ram[at + 2 * size - 1] = 0x70;
                }
            }
            // A 16-bit double shift by more than 16 has no defined result.
            (M::Shld | M::Shrd, _) => {
                let count = match case.insn.op_kind(2) {
                    OpKind::Register => case.registers.gprs[1],
                    _ => case.insn.immediate(2),
                };
                let size = if memory { size } else { case.insn.op0_register().size() };
                return size != 2 || count & 31 <= 16;
            }
            (M::Div | M::Idiv, _) if self.random.chance(2) => {
                // A small dividend's quotient fits, unless RAX or RDX is the divisor's address.
                let register = |r: Register| {
                    r != Register::None && matches!(r.full_register(), Register::RAX | Register::RDX)
                };
                if register(case.insn.memory_base()) || register(case.insn.memory_index()) {
                    return true;
                }
                case.registers.gprs[0] &= 0x7f;
                case.registers.gprs[2] = 0;
            }
            _ => {}
        }
        true
    }
}

impl Bench {
    /// String instructions with random prefixes, counts and directions over memory with runs of equal elements.
    fn strings(&mut self, rounds: u32) {
        for _ in 0..rounds {
            for opcode in [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf] {
                let case = self.string(opcode);
                assert!(self.compare(case));
            }
        }
    }

    fn string(&mut self, opcode: u8) -> Case {
        let mut registers = self.registers();
        let mut ram = self.ram();
        if self.random.chance(2) {
            ram.fill(value(&mut self.random) as u8);
            for _ in 0..8 {
                let at = self.random.below(RAM_LEN as u64) as usize;
                ram[at] = self.random.next() as u8;
            }
            registers.gprs[0] = u64::from(ram[0]) * 0x0101_0101_0101_0101;
        }
        let random = &mut self.random;
        let mut bytes = Vec::new();
        let address32 = self.bitness == 64 && random.chance(3);
        if address32 {
            bytes.push(0x67);
        }
        if random.chance(3) {
            bytes.push(0x66);
        }
        if random.chance(4) {
            bytes.push([0x36, 0x3e, 0x26, 0x2e][random.below(4) as usize]);
        }
        if random.chance(2) {
            bytes.push(0xf2 + random.below(2) as u8);
        }
        if self.bitness == 64 && random.chance(2) {
            bytes.push(0x40 | random.below(16) as u8);
        }
        bytes.push(opcode);
        let ram_at = self.native.ram();
        registers.gprs[1] = random.below(24);
        registers.gprs[6] = ram_at + 0x400 + random.below(0x800);
        registers.gprs[7] = ram_at + 0x400 + random.below(0x800);
        if address32 {
            for gpr in [1, 6, 7] {
                registers.gprs[gpr] |= random.next() << 32;
            }
        }
        if self.bitness == 32 {
            registers.gprs[0] &= 0xffff_ffff;
        }
        let (ip, _) = self.native.prepare(&bytes);
        let insn = self.decode(&bytes, ip).expect("a string instruction");
        Case { bytes, insn, registers, ram }
    }

    /// MOV between the accumulator and an absolute address.
    fn absolute(&mut self, rounds: u32) {
        for round in 0..rounds {
            let registers = self.registers();
            let ram = self.ram();
            let mut bytes = Vec::new();
            let random = &mut self.random;
            let mut width = if self.bitness == 64 { 8 } else { 4 };
            if random.chance(3) {
                bytes.push(0x66);
            }
            if self.bitness == 64 && random.chance(3) {
                bytes.push(0x67);
                width = 4;
            }
            if self.bitness == 64 && random.chance(2) {
                bytes.push(0x48);
            }
            bytes.push(0xa0 + (round % 4) as u8);
            let target = self.native.ram() + random.below(RAM_LEN as u64 - 8);
            bytes.extend(&target.to_le_bytes()[..width]);
            let (ip, _) = self.native.prepare(&bytes);
            let insn = self.decode(&bytes, ip).expect("mov moffs");
            assert!(self.compare(Case { bytes, insn, registers, ram }));
        }
    }
}

/// An instruction without ModRM.
struct Plain {
    bytes: Vec<u8>,
    /// It takes an operand-size prefix and REX.W.
    sized: bool,
    /// It takes an address-size prefix.
    counted: bool,
}

fn plain_insn(bytes: &[u8]) -> Plain {
    Plain { bytes: bytes.to_vec(), sized: false, counted: false }
}

fn sized(bytes: &[u8]) -> Plain {
    Plain { sized: true, ..plain_insn(bytes) }
}

/// Where branches go: over the five bytes between the instruction and the landing place.
const OVER: u8 = 5;

fn plain_insns(bitness: u32, random: &mut Random) -> Vec<Plain> {
    let mut all: Vec<Plain> =
        [0x9e, 0x9f, 0xf5, 0xf8, 0xf9, 0xfc, 0xfd, 0x90, 0xc3].map(|op| plain_insn(&[op])).into();
    all.extend([0x98, 0x99, 0xc9, 0x9c, 0x9d].map(|op| sized(&[op])));
    all.extend(
        [&[0xf3, 0x90][..], &[0x0f, 0xae, 0xe8], &[0x0f, 0xae, 0xf0], &[0x0f, 0xae, 0xf8]].map(plain_insn),
    );
    all.push(plain_insn(&[0xc2, random.next() as u8, 0]));
    all.push(sized(&[0x6a, random.next() as u8]));
    all.push(plain_insn(&[0x68, random.next() as u8, 2, 3, random.next() as u8]));
    for level in [0, 1, 2, 3, 31, random.next() as u8] {
        all.push(sized(&[0xc8, random.next() as u8, random.below(2) as u8, level]));
    }
    for reg in [0, 1, 2, 3, 5, 6, 7] {
        all.extend([sized(&[0x50 + reg]), sized(&[0x58 + reg]), sized(&[0x90 + reg])]);
        all.push(plain_insn(&[0x0f, 0xc8 + reg]));
        all.push(plain_insn(&[0xb8 + reg, 1, 2, 3, random.next() as u8]));
        all.push(plain_insn(&[0xb0 + (reg & 3), random.next() as u8]));
    }
    for condition in 0..16 {
        all.push(plain_insn(&[0x70 + condition, OVER]));
        all.push(plain_insn(&[0x0f, 0x80 + condition, OVER, 0, 0, 0]));
    }
    all.extend([&[0xeb, OVER][..], &[0xe9, OVER, 0, 0, 0], &[0xe8, OVER, 0, 0, 0]].map(plain_insn));
    all.extend((0xe0..=0xe3).map(|op| Plain { counted: true, ..plain_insn(&[op, OVER]) }));
    all.push(Plain { counted: true, ..plain_insn(&[0xd7]) });
    if bitness == 32 {
        all.extend([0x27, 0x2f, 0x37, 0x3f, 0xd6].map(|op| plain_insn(&[op])));
        all.extend(
            [0xd4, 0xd5].map(|op| plain_insn(&[op, [10, random.next() as u8 | 1][random.below(2) as usize]])),
        );
        all.extend([0x60, 0x61].map(|op| sized(&[op])));
        for reg in [0, 1, 2, 3, 5, 6, 7] {
            all.extend([sized(&[0x40 + reg]), sized(&[0x48 + reg])]);
        }
    } else {
        all.extend((0..8).map(|reg| plain_insn(&[0x48, 0x0f, 0xc8 + (reg | 1)])));
        all.extend((0..8).map(|reg| plain_insn(&[0x41, 0x0f, 0xc8 + reg])));
    }
    all
}

impl Bench {
    fn plain(&mut self, rounds: u32) {
        for _ in 0..rounds {
            for insn in plain_insns(self.bitness, &mut self.random) {
                let case = self.plain_case(insn);
                self.compare(case);
            }
        }
    }

    fn plain_case(&mut self, plain: Plain) -> Case {
        let mut registers = self.registers();
        let mut ram = self.ram();
        for quadword in ram[0x1600..0x1c00].chunks_exact_mut(8) {
            quadword.copy_from_slice(&value(&mut self.random).to_le_bytes());
        }
        let random = &mut self.random;
        let wide = self.bitness == 64;
        let mut bytes = Vec::new();
        let short_address = plain.counted && wide && random.chance(2);
        if short_address {
            bytes.push(0x67);
        }
        if plain.sized && random.chance(2) {
            bytes.push(0x66);
        } else if plain.sized && wide && random.chance(2) {
            bytes.push(0x48);
        }
        bytes.extend(plain.bytes);
        let (ip, landing) = self.native.prepare(&bytes);
        let insn = self.decode(&bytes, ip).expect("an instruction without ModRM");
        let random = &mut self.random;
        let stack = self.native.ram();
        let top = (registers.gprs[4] - stack) as usize;
        match insn.mnemonic() {
            M::Ret => ram[top..top + 8].copy_from_slice(&landing.to_le_bytes()),
            M::Popf | M::Popfd | M::Popfq => {
                let image = random.next() & (STATUS | DF | ID | IF | 3 << 12) | 2;
                ram[top..top + 8].copy_from_slice(&image.to_le_bytes());
            }
            M::Leave => registers.gprs[5] = stack + 0x1000 + random.below(0x800),
            // Without outer levels RBP is only saved.
            M::Enter if insn.immediate8_2nd() % 32 <= 1 => {}
            M::Enter => {
                let near = random.chance(2);
                registers.gprs[5] = if near { registers.gprs[4] + random.below(32) } else { stack + 0x800 };
            }
            M::Xlatb => registers.gprs[3] = stack + OPERANDS as u64,
            _ if plain.counted => registers.gprs[1] = random.below(3),
            _ => {}
        }
        if short_address {
            registers.gprs[1] |= random.next() << 32;
            registers.gprs[3] |= random.next() << 32;
        }
        Case { bytes, insn, registers, ram }
    }
}

/// Status flags that the manuals leave undefined after `insn`. AMD APM vol. 3.
fn undefined(insn: &Instruction, before: &Registers) -> u64 {
    let size = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    };
    let bits = 8 * size as u64;
    let count = |operand: u32| {
        let count = match insn.op_kind(operand) {
            OpKind::Register => before.gprs[1] & 0xff,
            _ => insn.immediate(operand),
        };
        count & if size == 8 { 63 } else { 31 }
    };
    match insn.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => AF,
        M::Rol | M::Ror | M::Rcl | M::Rcr => match count(1) {
            0 | 1 => 0,
            _ => OF,
        },
        M::Shl | M::Sal | M::Shr | M::Sar => match count(1) {
            0 => 0,
            1 => AF,
            count if count >= bits && insn.mnemonic() != M::Sar => AF | OF | CF,
            _ => AF | OF,
        },
        M::Shld | M::Shrd => match count(2) {
            0 => 0,
            1 => AF,
            count if count > bits => STATUS,
            _ => AF | OF,
        },
        M::Bt | M::Bts | M::Btr | M::Btc => OF | SF | AF | PF,
        M::Bsf | M::Bsr => CF | OF | SF | AF | PF,
        M::Tzcnt | M::Lzcnt => OF | SF | AF | PF,
        M::Mul | M::Imul => SF | ZF | AF | PF,
        M::Div | M::Idiv => STATUS,
        M::Andn | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => AF | PF,
        M::Bextr => AF | SF | PF,
        M::Aaa | M::Aas => OF | SF | ZF | PF,
        M::Daa | M::Das => OF,
        M::Aam | M::Aad => OF | AF | CF,
        _ => 0,
    }
}

fn check(forms: &[Form], rounds: u32, seed: u64) {
    for bitness in [64, 32] {
        let Some(mut bench) = Bench::new(bitness, seed) else { return };
        bench.forms(forms, rounds);
        let executed = bench.executed;
        assert!(executed as usize > forms.len() * rounds as usize / 3, "only {executed} compared");
    }
}

#[test]
fn moves_match_the_processor() {
    check(&moves(), 400, 1);
}

#[test]
fn arithmetic_matches_the_processor() {
    check(&arithmetic(), 300, 2);
}

#[test]
fn shifts_and_bits_match_the_processor() {
    check(&shifts_and_bits(), 300, 3);
}

#[test]
fn exchanges_match_the_processor() {
    check(&exchanges(), 1500, 4);
}

#[test]
fn stack_and_branches_match_the_processor() {
    check(&stack_and_branches(), 1500, 5);
}

#[test]
fn extensions_match_the_processor() {
    check(&extensions(), 1000, 8);
}

#[test]
fn addresses_match_the_processor() {
    check(&addresses(), 500, 9);
}

#[test]
fn instructions_without_operand_byte_match_the_processor() {
    for bitness in [64, 32] {
        let Some(mut bench) = Bench::new(bitness, 10) else { return };
        bench.plain(200);
        assert!(bench.executed > 200 * 90);
    }
}

#[test]
fn bounds_match_the_processor() {
    let Some(mut bench) = Bench::new(32, 11) else { return };
    bench.forms(&[one(0x62).memory()], 2000);
    assert!(bench.executed > 300);
}

#[test]
fn strings_match_the_processor() {
    for bitness in [64, 32] {
        let Some(mut bench) = Bench::new(bitness, 6) else { return };
        bench.strings(600);
        assert_eq!(bench.executed, 6000);
    }
}

#[test]
fn absolute_addresses_match_the_processor() {
    for bitness in [64, 32] {
        let Some(mut bench) = Bench::new(bitness, 7) else { return };
        bench.absolute(2000);
        assert_eq!(bench.executed, 2000);
    }
}
