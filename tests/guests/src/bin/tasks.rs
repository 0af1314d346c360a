//! Hardware task switches: by JMP, CALL, IRET and task gates, from 32-bit modes with paging off and on. SVM's processor
//! does them itself; on VMX every one exits and is the hypervisor's to do.
#![no_std]
#![no_main]
// Payloads are assembled into statics whose addresses are taken.
#![allow(unsafe_code)]
use guests::exec;
use guests::machine::{self, DATA, DATA16, USER_CODE32, USER_DATA};
use guests::modes::{self, Mode, Outcome, Registers, PAYLOAD, SCRATCH};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{BP, DB, DF, GP, NMI, NP, PF, SS, TS, UD};
use guests::{dev, main, payload, platform};

main!(run);

/// Code of the first task, entered with CALL: what causes the switch, and a RET for when it is switched back to.
const CAUSE: u32 = 0x8800;
/// Code of the other task, behind the recorder.
const ENDING: u32 = 0x8900;
/// Code that is behind everything.
const LAST: u32 = 0x8a00;
/// Where the other tasks begin: the recorder of the payload below.
const RECORDER: u32 = PAYLOAD + 16;

/// The first task's TSS, the other's, and that of a third which takes what goes wrong in the other.
const TSS_A: u64 = SCRATCH as u64;
const TSS_B: u64 = SCRATCH as u64 + 0x100;
const TSS_C: u64 = SCRATCH as u64 + 0x200;
const LDT: u64 = SCRATCH as u64 + 0x300;
/// What the recorder writes.
const RECORD: u64 = 0xa000;
/// Stacks.
const STACK_B: u32 = 0xaff0;
const STACK_C: u32 = 0xb7f0;
const STACK_0: u32 = 0xbff0;
/// Other page tables, which have the low memory at [`ALIAS`] as well.
const OTHER_TABLES: u64 = 0xd000;
const ALIAS: u32 = 0x4000_0000;
/// A word that only an LDT segment or the other tables lead to.
const TREASURE: u64 = SCRATCH as u64 + 0xf0;

/// Selectors.
const A: u16 = machine::SCRATCH;
const B: u16 = machine::SCRATCH + 8;
const C: u16 = machine::SCRATCH + 16;
const EXTRA: u16 = machine::SCRATCH + 24;

const NT: u32 = 1 << 14;
const RF: u32 = 1 << 16;
const VM: u32 = 1 << 17;
const CR0_TS: u32 = 1 << 3;
const BUSY: u64 = 1 << 41;

payload!(
    tasks,
    tasks_start,
    tasks_end,
    "32",
    // LTR CX; then the cause, with the return address on top of the stack.
    ".byte 0x0f, 0x00, 0xd9, 0x68",
    ".long 0x8800",
    "ret",
    ".skip 7, 0x90",
    // The recorder.
    "mov [0xa000], eax",
    "mov [0xa004], ecx",
    "mov [0xa008], edx",
    "mov [0xa00c], ebx",
    "mov [0xa010], esp",
    "mov [0xa014], ebp",
    "mov [0xa018], esi",
    "mov [0xa01c], edi",
    "pop eax",
    "push eax",
    "mov [0xa020], eax",
    "pushfd",
    "pop dword ptr [0xa024]",
    "str word ptr [0xa028]",
    "sldt word ptr [0xa02a]",
    "mov word ptr [0xa02c], es",
    "mov word ptr [0xa02e], cs",
    "mov word ptr [0xa030], ss",
    "mov word ptr [0xa032], ds",
    "mov word ptr [0xa034], fs",
    "mov word ptr [0xa036], gs",
    "inc dword ptr [0xa038]",
    // A 16-bit TSS leaves FS null.
    "cmp word ptr [0xa034], 0",
    "je 2f",
    "mov eax, fs:[0xf0]",
    "mov [0xa03c], eax",
    "2: test byte ptr [0xa02e], 3",
    "jnz 1f",
    "mov eax, cr0",
    "mov [0xa040], eax",
    "mov eax, cr3",
    "mov [0xa044], eax",
    "mov eax, dr7",
    "mov [0xa04c], eax",
    // Only a 32-bit TSS has all of EDI.
    "cmp word ptr [0xa034], 0",
    "je 1f",
    "mov eax, [edi]",
    "mov [0xa048], eax",
    "1: mov eax, [0xa000]",
    "push 0x8900",
    "ret"
);

/// What the recorder saw.
#[repr(C)]
#[derive(Clone, Copy)]
struct Record {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    gprs: [u32; 8],
    top: u32,
    eflags: u32,
    tr: u16,
    ldtr: u16,
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    count: u32,
    through_fs: u32,
    cr0: u32,
    cr3: u32,
    through_edi: u32,
    dr7: u32,
}

/// What goes into a TSS. Intel SDM vol. 3, 7.2.1 and 7.6.
#[derive(Clone, Copy)]
struct Task {
    link: u16,
    cr3: u32,
    eip: u32,
    eflags: u32,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    gprs: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

const ES: usize = 0;
const CS: usize = 1;
const STACK: usize = 2;
const DS: usize = 3;
const FS: usize = 4;
const ESP: usize = 4;
const EDI: usize = 7;

impl Task {
    fn new(cr3: u64, esp: u32) -> Task {
        Task {
            link: 0,
            cr3: cr3 as u32,
            eip: RECORDER,
            eflags: 2,
            gprs: [
                0xb000_0001,
                0xb000_0002,
                0xb000_0003,
                0xb000_0004,
                esp,
                0xb000_0006,
                0xb000_0007,
                SCRATCH,
            ],
            segments: [DATA, machine::CODE32, DATA, DATA, DATA, DATA],
            ldt: 0,
            trap: false,
        }
    }

    fn user(self) -> Task {
        let data = USER_DATA;
        Task { segments: [data, USER_CODE32, data, data, data, data], ..self }
    }

    fn write32(&self, at: u64) {
        clear(at, 0x68);
        poke(at, u32::from(self.link));
        poke(at + 4, STACK_0);
        poke(at + 8, u32::from(DATA));
        poke(at + 0x1c, self.cr3);
        poke(at + 0x20, self.eip);
        poke(at + 0x24, self.eflags);
        (0..8).for_each(|n| poke(at + 0x28 + n * 4, self.gprs[n as usize]));
        (0..6).for_each(|n| poke(at + 0x48 + n * 4, u32::from(self.segments[n as usize])));
        poke(at + 0x60, u32::from(self.ldt));
        poke(at + 0x64, 0x68 << 16 | u32::from(self.trap));
    }

    /// Its 16-bit stack segment makes the upper half of ESP, which nothing defines, irrelevant.
    fn write16(&self, at: u64) {
        clear(at, 0x2c);
        poke(at, self.link);
        poke(at + 2, STACK_0 as u16);
        poke(at + 4, DATA16);
        poke(at + 0xe, self.eip as u16);
        poke(at + 0x10, self.eflags as u16);
        (0..8).for_each(|n| poke(at + 0x12 + n * 2, self.gprs[n as usize] as u16));
        (0..4).for_each(|n| poke(at + 0x22 + n * 2, self.segments[n as usize]));
        poke(at + 0x26, DATA16);
        poke(at + 0x2a, self.ldt);
    }
}

fn clear(at: u64, len: u64) {
    (0..len).for_each(|offset| poke(at + offset, 0u8));
}

/// An available 32-bit TSS.
const TSS32: u64 = 0x89;
/// An available 16-bit TSS.
const TSS16: u64 = 0x81;

fn tss_descriptor(selector: u16, base: u64, limit: u64, rights: u64) {
    machine::set_descriptor(selector, limit | base << 16 | rights << 40);
}

fn task_gate(selector: u16, rights: u64) -> u64 {
    u64::from(selector) << 16 | rights << 40
}

const GATE: u64 = 0x85;

/// JMP far and CALL far, each followed by RET for the way back.
fn jump(selector: u16) -> [u8; 8] {
    let [low, high] = selector.to_le_bytes();
    [0xea, 0, 0, 0, 0, low, high, 0xc3]
}

fn call(selector: u16) -> [u8; 8] {
    let [low, high] = selector.to_le_bytes();
    [0x9a, 0, 0, 0, 0, low, high, 0xc3]
}

const UD2: [u8; 2] = [0x0f, 0x0b];
const IRET: [u8; 1] = [0xcf];

/// The first task's registers. ECX is what it loads into TR.
const REGISTERS: Registers = Registers {
    eax: 0xa000_0001,
    ebx: 0xa000_0004,
    ecx: A as u32,
    edx: 0xa000_0003,
    esi: 0xa000_0007,
    edi: 0xa000_0008,
    ebp: 0xa000_0006,
};

/// Three tasks that are ready to run.
struct World {
    mode: Mode,
    cr3: u64,
    b: Task,
    registers: Registers,
}

impl World {
    fn new(mode: Mode, cause: &[u8], ending: &[u8]) -> World {
        let cr3 = modes::prepare(mode, tasks());
        code(CAUSE, cause);
        code(ENDING, ending);
        clear(RECORD, core::mem::size_of::<Record>() as u64);
        clear(LDT, 0x20);
        clear(u64::from(STACK_B), 16);
        poke(TREASURE, 0x600d_cafeu32);
        // Of the first task's TSS, only CR3, the LDT and ESP0 are read before they are written.
        Task { eip: 0, eflags: 0, gprs: [0; 8], segments: [0; 6], ..Task::new(cr3, 0) }.write32(TSS_A);
        Task::new(cr3, STACK_C).write32(TSS_C);
        let b = Task::new(cr3, STACK_B);
        b.write32(TSS_B);
        tss_descriptor(A, TSS_A, 0x67, TSS32);
        tss_descriptor(B, TSS_B, 0x67, TSS32);
        tss_descriptor(C, TSS_C, 0x67, TSS32);
        machine::set_descriptor(EXTRA, 0);
        World { mode, cr3, b, registers: REGISTERS }
    }

    /// Other tables, which map the low memory twice; their address.
    fn other_tables(&self) -> u64 {
        (0..512).for_each(|n| poke(OTHER_TABLES + n * 8, peek::<u64>(self.cr3 + n * 8)));
        match self.mode {
            Mode::Pae => poke(OTHER_TABLES + 8, peek::<u64>(self.cr3)),
            _ => poke(OTHER_TABLES + u64::from(ALIAS >> 22) * 4, peek::<u32>(self.cr3)),
        }
        OTHER_TABLES
    }

    fn run(&self) -> (Outcome, Record) {
        let outcome = modes::run_prepared(self.mode, self.registers, self.cr3);
        // TR and LDTR are the last task's.
        machine::load_tss();
        exec!("lldt {0:x}", in(reg) 0u32);
        (outcome, peek(RECORD))
    }

    /// The first task comes to its end.
    fn good(&self, t: &mut Case) -> (Outcome, Record) {
        let (outcome, record) = self.run();
        t.check(
            outcome.fault.is_none(),
            format_args!("no fault in {:?} mode, got {:?}", self.mode, outcome.fault),
        );
        (outcome, record)
    }

    /// An exception ends the tasks. Outside the tasks' code the place does not count.
    fn bad(&self, t: &mut Case, vector: u8, error: u16, eip: u32) -> Record {
        let (outcome, record) = self.run();
        let fault = t.faults("the tasks", outcome.fault.map_or(Ok(()), Err), vector, Some(error.into()));
        t.eq("its EIP", fault.rip, eip);
        record
    }

    /// The other task is entered and ends with UD2.
    fn arrives(&self, t: &mut Case) -> Record {
        let record = self.bad(t, UD, 0, ENDING);
        t.eq("switches", record.count, 1u32);
        record
    }

    /// Exception `vector` happens when the other task has been entered, and a third task takes it.
    fn fails_inside(&self, t: &mut Case, vector: u8, error: u16) {
        modes::set_gate32(vector, task_gate(C, GATE));
        let record = self.arrives(t);
        t.eq("TR", record.tr, C);
        t.eq("error code", record.top, error);
        t.eq("back link", peek::<u16>(TSS_C), B);
        // TCG goes back to the instruction that caused the switch, as for a fault before it.
        if !platform::tcg() {
            t.eq("saved EIP of the task that failed", peek::<u32>(TSS_B + 0x20), self.b.eip);
        }
        t.eq("its saved ESP", peek::<u32>(TSS_B + 0x38), self.b.gprs[ESP]);
        t.eq("the first task's TSS is busy", machine::descriptor(A) & BUSY, 0u64);
        t.eq("that of the task that failed is", machine::descriptor(B) & BUSY, BUSY);
    }
}

fn code(at: u32, bytes: &[u8]) {
    bytes.iter().zip(0..).for_each(|(&byte, offset)| poke(u64::from(at) + offset, byte));
}

/// A case per mode, `MODE.NAME`.
fn each(name: &str, run: impl Fn(&mut Case, Mode)) {
    for (mode, text) in [(Mode::Protected, "protected."), (Mode::Paged, "paged."), (Mode::Pae, "pae.")] {
        let mut buffer = [0u8; 64];
        let len = text.len() + name.len();
        buffer[..text.len()].copy_from_slice(text.as_bytes());
        buffer[text.len()..len].copy_from_slice(name.as_bytes());
        case(core::str::from_utf8(&buffer[..len]).unwrap_or("mode"), |t| run(t, mode));
    }
}

fn run() {
    jumps();
    calls();
    interrupts();
    contents();
    refused();
    failures_inside();
    ring_3();
    long();
}

fn saved(selector: u64, field: u64) -> u32 {
    peek(selector + field)
}

fn jumps() {
    each("jump_and_back", |t, mode| {
        let world = World::new(mode, &jump(B), &jump(A));
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.check(record.gprs == world.b.gprs, format_args!("{:x?}, got {:x?}", world.b.gprs, record.gprs));
        t.check(
            record.segments == world.b.segments,
            format_args!("segments {:x?}, got {:x?}", world.b.segments, record.segments),
        );
        t.eq("TR", record.tr, B);
        t.eq("LDTR", record.ldtr, 0u16);
        t.eq("EFLAGS without NT", record.eflags & !RF, 2u32);
        t.eq("CR0.TS", record.cr0 & CR0_TS, CR0_TS);
        t.eq("saved EIP", saved(TSS_A, 0x20), CAUSE + 7);
        t.eq("saved EAX", saved(TSS_A, 0x28), REGISTERS.eax);
        t.eq("saved EDI", saved(TSS_A, 0x44), REGISTERS.edi);
        t.eq("saved CS", saved(TSS_A, 0x4c), u32::from(machine::CODE32));
        t.eq("saved GS", saved(TSS_A, 0x5c), u32::from(DATA));
        t.eq("saved EIP of the other", saved(TSS_B, 0x20), ENDING + 7);
        t.eq("the first TSS is busy", machine::descriptor(A) & BUSY, BUSY);
        t.eq("the other is not", machine::descriptor(B) & BUSY, 0u64);
        t.eq("back link", peek::<u16>(TSS_B), 0u16);
    });
    each("jump_marks_busy", |t, mode| {
        World::new(mode, &jump(B), &UD2).arrives(t);
        t.eq("the first TSS is busy", machine::descriptor(A) & BUSY, 0u64);
        t.eq("the other is", machine::descriptor(B) & BUSY, BUSY);
    });
    each("jump_to_16_bit", |t, mode| {
        let mut world = World::new(mode, &jump(B), &jump(A));
        world.b.segments[STACK] = DATA16;
        world.b.write16(TSS_B);
        tss_descriptor(B, TSS_B, 0x2b, TSS16);
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        for n in 0..8 {
            t.eq("low half of a register", record.gprs[n] & 0xffff, world.b.gprs[n] & 0xffff);
        }
        t.eq("SS", record.segments[STACK], DATA16);
        // It has neither FS nor GS: they are null.
        t.eq("saved IP of the other", peek::<u16>(TSS_B + 0xe), (ENDING + 7) as u16);
        t.eq("saved SP", peek::<u16>(TSS_B + 0x1a), STACK_B as u16);
        t.eq("the field behind the saved selectors", peek::<u16>(TSS_B + 0x2a), 0u16);
    });
    each("jump_from_16_bit", |t, mode| {
        let world = World::new(mode, &jump(B), &UD2);
        tss_descriptor(A, TSS_A, 0x2b, TSS16);
        (0..0x68).for_each(|offset| poke(TSS_A + offset, 0xeeu8));
        world.arrives(t);
        t.eq("saved IP", peek::<u16>(TSS_A + 0xe), (CAUSE + 7) as u16);
        t.eq("saved AX", peek::<u16>(TSS_A + 0x12), REGISTERS.eax as u16);
        t.eq("saved DI", peek::<u16>(TSS_A + 0x20), REGISTERS.edi as u16);
        t.eq("saved CS", peek::<u16>(TSS_A + 0x24), machine::CODE32);
        t.eq("saved DS", peek::<u16>(TSS_A + 0x28), DATA);
        t.eq("LDT field, which is not written", peek::<u16>(TSS_A + 0x2a), 0xeeeeu16);
    });
    each("jump_through_gate", |t, mode| {
        let world = World::new(mode, &jump(EXTRA), &jump(A));
        machine::set_descriptor(EXTRA, task_gate(B, GATE));
        let (_, record) = world.good(t);
        t.eq("TR", record.tr, B);
    });
}

fn calls() {
    each("call_and_iret", |t, mode| {
        let world = World::new(mode, &call(B), &IRET);
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.eq("NT inside", record.eflags & NT, NT);
        t.eq("NT afterwards", outcome.eflags & NT, 0u32);
        t.eq("back link", peek::<u16>(TSS_B), A);
        t.eq("saved EIP", saved(TSS_A, 0x20), CAUSE + 7);
        t.eq("saved EIP of the other, behind IRET", saved(TSS_B, 0x20), ENDING + 1);
        t.eq("saved NT of the other", saved(TSS_B, 0x24) & NT, 0u32);
        t.eq("the first TSS is busy", machine::descriptor(A) & BUSY, BUSY);
        t.eq("the other is not", machine::descriptor(B) & BUSY, 0u64);
    });
    each("call_leaves_both_busy", |t, mode| {
        World::new(mode, &call(B), &UD2).arrives(t);
        t.eq("the first TSS is busy", machine::descriptor(A) & BUSY, BUSY);
        t.eq("the other is", machine::descriptor(B) & BUSY, BUSY);
    });
    each("call_through_gate", |t, mode| {
        let world = World::new(mode, &call(EXTRA), &IRET);
        machine::set_descriptor(EXTRA, task_gate(B, GATE));
        let (_, record) = world.good(t);
        t.eq("TR", record.tr, B);
        t.eq("NT inside", record.eflags & NT, NT);
        t.eq("back link", peek::<u16>(TSS_B), A);
    });
    each("call_of_16_bit", |t, mode| {
        let mut world = World::new(mode, &call(B), &IRET);
        world.b.segments[STACK] = DATA16;
        world.b.write16(TSS_B);
        tss_descriptor(B, TSS_B, 0x2b, TSS16);
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.eq("NT inside", record.eflags & NT, NT);
        t.eq("back link", peek::<u16>(TSS_B), A);
    });
    each("thousand_calls", |t, mode| {
        // mov ecx, 1000; 1: call B:0; loop 1b; ret. The other does IRET and starts again behind it.
        let cause = [0xb9, 0xe8, 3, 0, 0, 0x9a, 0, 0, 0, 0, B as u8, 0, 0xe2, 0xf7, 0xc3];
        // 1: inc [count]; iret; jmp 1b
        let ending = [0xff, 0x05, 0x38, 0xa0, 0, 0, 0xcf, 0xeb, 0xf7];
        let (_, record) = World::new(mode, &cause, &ending).good(t);
        t.eq("calls", record.count, 1001u32);
    });
}

/// Behind the recorder, of a task for exception `vector`: pops the error code where there is one, moves the
/// interrupted task `skip` bytes on, IRET.
fn step_on(has_code: bool, skip: u8) -> [u8; 9] {
    let pop = if has_code { 0x58 } else { 0x90 };
    let [low, high] = (TSS_A as u16 + 0x20).to_le_bytes();
    [pop, 0x83, 0x05, low, high, 0, 0, skip, 0xcf]
}

/// Skips what comes through a task gate by an instruction, where Bochs says that it was the exception before. True when
/// skipped.
fn skip_by_instruction(t: &mut Case) -> bool {
    platform::shadow() && t.skip_on_bochs_svm("INT n leaves the event before it in EXITINTINFO")
}

fn interrupts() {
    each("gate.int_n", |t, mode| {
        if skip_by_instruction(t) {
            return;
        }
        let world = World::new(mode, &[0xcd, 0x21, 0xc3], &IRET);
        modes::set_gate32(0x21, task_gate(B, GATE));
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.eq("switches", record.count, 1u32);
        t.eq("NT inside", record.eflags & NT, NT);
        t.eq("back link", peek::<u16>(TSS_B), A);
        t.eq("saved EIP, behind INT", saved(TSS_A, 0x20), CAUSE + 2);
        t.eq("ESP, nothing pushed", record.gprs[ESP], STACK_B);
    });
    each("gate.breakpoint", |t, mode| {
        if skip_by_instruction(t) {
            return;
        }
        let world = World::new(mode, &[0xcc, 0xc3], &IRET);
        modes::set_gate32(BP, task_gate(B, GATE));
        world.good(t);
        t.eq("saved EIP, behind INT3", saved(TSS_A, 0x20), CAUSE + 1);
    });
    each("gate.int1", |t, mode| {
        if t.skip_on_tcg("INT1 is undefined") || skip_by_instruction(t) {
            return;
        }
        let world = World::new(mode, &[0xf1, 0xc3], &IRET);
        modes::set_gate32(DB, task_gate(B, GATE));
        world.good(t);
        t.eq("saved EIP, behind INT1", saved(TSS_A, 0x20), CAUSE + 1);
    });
    each("gate.into", |t, mode| {
        if skip_by_instruction(t) {
            return;
        }
        // mov al, 0x7f; inc al; into; ret
        let world = World::new(mode, &[0xb0, 0x7f, 0xfe, 0xc0, 0xce, 0xc3], &IRET);
        modes::set_gate32(guests::trap::OF, task_gate(B, GATE));
        world.good(t);
        t.eq("saved EIP, behind INTO", saved(TSS_A, 0x20), CAUSE + 5);
    });
    each("gate.exception_without_error_code", |t, mode| {
        let world = World::new(mode, &[0x0f, 0x0b, 0xc3], &step_on(false, 2));
        modes::set_gate32(UD, task_gate(B, GATE));
        let (_, record) = world.good(t);
        t.eq("ESP, nothing pushed", record.gprs[ESP], STACK_B);
    });
    each("gate.exception_with_error_code", |t, mode| {
        // mov eax, 0x1000; mov es, eax; ret
        let world = World::new(mode, &[0xb8, 0, 0x10, 0, 0, 0x8e, 0xc0, 0xc3], &step_on(true, 2));
        modes::set_gate32(GP, task_gate(B, GATE));
        let (outcome, record) = world.good(t);
        t.eq("error code", record.top, 0x1000u32);
        t.eq("ESP", record.gprs[ESP], STACK_B - 4);
        t.eq("EAX afterwards", outcome.registers.eax, 0x1000u32);
        // TCG never sets it.
        if !platform::tcg() {
            t.eq("saved RF", saved(TSS_A, 0x24) & RF, RF);
        }
    });
    each("gate.error_code_on_16_bit_stack", |t, mode| {
        let mut world = World::new(mode, &[0xb8, 0, 0x10, 0, 0, 0x8e, 0xc0, 0xc3], &jump(C));
        world.b.segments[STACK] = DATA16;
        world.b.write16(TSS_B);
        tss_descriptor(B, TSS_B, 0x2b, TSS16);
        modes::set_gate32(GP, task_gate(B, GATE));
        // With a 16-bit TSS in TR there is no way into long mode: the third task has the end.
        Task { eip: LAST, ..Task::new(world.cr3, STACK_C) }.write32(TSS_C);
        code(LAST, &UD2);
        let record = world.bad(t, UD, 0, LAST);
        t.eq("error code", record.top & 0xffff, 0x1000u32);
        t.eq("SP", record.gprs[ESP] & 0xffff, STACK_B - 2);
    });
    case("paged.gate.page_fault", |t| {
        // mov eax, [ALIAS]; ret
        let world = World::new(Mode::Paged, &[0xa1, 0, 0, 0, 0x40, 0xc3], &step_on(true, 5));
        modes::set_gate32(PF, task_gate(B, GATE));
        let (outcome, record) = world.good(t);
        t.eq("error code", record.top, 0u32);
        t.eq("CR2", cr2() as u32, ALIAS);
        t.eq("EAX afterwards, not loaded", outcome.registers.eax, REGISTERS.eax);
    });
    each("gate.double_fault", |t, mode| {
        // #GP without a gate is #NP, and both together are #DF.
        let world = World::new(mode, &[0xb8, 0, 0x10, 0, 0, 0x8e, 0xc0, 0xc3], &UD2);
        modes::set_gate32(GP, 0);
        modes::set_gate32(DF, task_gate(B, GATE));
        let record = world.arrives(t);
        t.eq("error code", record.top, 0u32);
        t.eq("ESP", record.gprs[ESP], STACK_B - 4);
    });
    each("gate.interrupt", |t, mode| {
        // 1: sti; hlt; cli; cmp [count], 3; jb 1b; ret
        let cause = [0xfb, 0xf4, 0xfa, 0x83, 0x3d, 0x38, 0xa0, 0, 0, 3, 0x72, 0xf4, 0xc3];
        // 1: mov al, 20h; out 20h, al; iret; inc [count]; jmp 1b
        let ending = [0xb0, 0x20, 0xe6, 0x20, 0xcf, 0xff, 0x05, 0x38, 0xa0, 0, 0, 0xeb, 0xf3];
        let world = World::new(mode, &cause, &ending);
        modes::set_gate32(0x20, task_gate(B, GATE));
        dev::pic::unmask(0);
        dev::pit::program(0, 2, 5000);
        let (outcome, record) = world.good(t);
        dev::pit::stop();
        dev::pic::mask_all();
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.within("interrupts", record.count.into(), 3, 100);
        t.eq("IF inside", record.eflags & FLAG_IF as u32, 0u32);
        t.eq("saved IF", saved(TSS_A, 0x24) & FLAG_IF as u32, FLAG_IF as u32);
        t.eq("ESP, nothing pushed", record.gprs[ESP], STACK_B);
    });
    each("gate.nmi", |t, mode| {
        if dev::lapic::x2apic() {
            return t.skip("sent through the memory-mapped registers");
        }
        // mov edx, 0xfee00300; and [edx + 0x10], 0; L: mov [edx], NMI to this; wait for the next count, twice; ret
        #[rustfmt::skip]
        let cause = [
            0xba, 0x00, 0x03, 0xe0, 0xfe,
            0xc7, 0x42, 0x10, 0, 0, 0, 0,
            0xc7, 0x02, 0x00, 0x44, 0, 0,
            0x83, 0x3d, 0x38, 0xa0, 0, 0, 1, 0x72, 0xf7,
            0xc7, 0x02, 0x00, 0x44, 0, 0,
            0x83, 0x3d, 0x38, 0xa0, 0, 0, 2, 0x72, 0xf7,
            0xc3,
        ];
        // 1: iret; inc [count]; jmp 1b
        let ending = [0xcf, 0xff, 0x05, 0x38, 0xa0, 0, 0, 0xeb, 0xf7];
        let world = World::new(mode, &cause, &ending);
        modes::set_gate32(NMI, task_gate(B, GATE));
        let (_, record) = world.good(t);
        // The task's IRET has ended the blocking, or the second would not have come.
        t.eq("NMIs", record.count, 2u32);
        t.eq("NT inside", record.eflags & NT, NT);
    });
}

fn contents() {
    for (name, mode) in [("paged.cr3_of_the_task", Mode::Paged), ("pae.cr3_of_the_task", Mode::Pae)] {
        case(name, |t| {
            // The first task reads CR3 when it is back.
            let cause = [0xea, 0, 0, 0, 0, B as u8, 0, 0x0f, 0x20, 0xd8, 0xc3];
            let mut world = World::new(mode, &cause, &jump(A));
            world.b.cr3 = world.other_tables() as u32;
            world.b.gprs[EDI] = ALIAS + TREASURE as u32;
            world.b.write32(TSS_B);
            let (outcome, record) = world.good(t);
            t.eq("CR3 inside", record.cr3, world.b.cr3);
            t.eq("a word that the other tables alone map", record.through_edi, 0x600d_cafeu32);
            t.eq("CR3 afterwards", outcome.registers.eax, world.cr3 as u32);
        });
    }
    each("ldt_of_the_task", |t, mode| {
        let mut world = World::new(mode, &call(B), &IRET);
        machine::set_descriptor(EXTRA, 0x0000_8200_0000_0000 | LDT << 16 | 0xf);
        poke(LDT + 8, 0x0040_9300_0000_00ffu64 | u64::from(SCRATCH) << 16);
        world.b.ldt = EXTRA;
        world.b.segments[FS] = 0xc;
        world.b.write32(TSS_B);
        let (_, record) = world.good(t);
        t.eq("LDTR", record.ldtr, EXTRA);
        t.eq("FS", record.segments[FS], 0xcu16);
        t.eq("a word through FS", record.through_fs, 0x600d_cafeu32);
    });
    each("local_breakpoints_are_switched_off", |t, mode| {
        // mov eax, L0 and G1; mov dr7, eax; and the jump
        let cause = [0xb8, 0x09, 0x04, 0, 0, 0x0f, 0x23, 0xf8, 0xea, 0, 0, 0, 0, B as u8, 0, 0xc3];
        let world = World::new(mode, &cause, &UD2);
        set_dr0(0x7fff_0000);
        set_dr1(0x7fff_0000);
        let record = world.arrives(t);
        t.eq("the enable bits of DR7", record.dr7 & 0xff, 8u32);
    });
    each("eflags_of_the_task", |t, mode| {
        let mut world = World::new(mode, &jump(B), &UD2);
        world.b.eflags = 0x4_0c97;
        world.b.write32(TSS_B);
        let record = world.arrives(t);
        t.eq("EFLAGS", record.eflags & !RF, 0x4_0c97u32);
    });
    each("trap_flag", |t, mode| {
        if t.skip_on_tcg("the T flag of a TSS is ignored")
            || t.skip_on_bochs_svm("an intercepted #DB does not set DR6")
        {
            return;
        }
        let mut world = World::new(mode, &jump(B), &UD2);
        world.b.trap = true;
        world.b.write32(TSS_B);
        set_dr6(0xffff_0ff0);
        let record = world.bad(t, DB, 0, RECORDER);
        t.eq("instructions of the task", record.count, 0u32);
        t.eq("DR6.BT", dr6() >> 15 & 1, 1u64);
    });
    each("virtual_8086_task", |t, mode| {
        if t.skip_on_bochs_svm("a #VMEXIT in virtual-8086 mode ends Bochs itself") {
            return;
        }
        let mut world = World::new(mode, &jump(B), &[]);
        // mov ax, 0x4321; mov bx, ds; hlt, which its I/O privilege level does not permit
        code(ENDING, &[0xb8, 0x21, 0x43, 0x8c, 0xdb, 0xf4]);
        world.b.eflags = VM | 2;
        world.b.segments = [0x111, 0x880, 0xa00, 0x333, 0x444, 0x555];
        world.b.eip = ENDING - 0x8800;
        world.b.gprs[ESP] = 0x800;
        world.b.write32(TSS_B);
        let (outcome, _) = world.run();
        let fault = t.faults("HLT", outcome.fault.map_or(Ok(()), Err), GP, Some(0));
        t.eq("IP", fault.rip, world.b.eip + 5);
        t.eq("AX", outcome.registers.eax & 0xffff, 0x4321u32);
        t.eq("BX, its DS", outcome.registers.ebx & 0xffff, 0x333u32);
        t.eq("EFLAGS.VM", outcome.eflags & VM, VM);
    });
}

fn refused() {
    each("busy", |t, mode| {
        World::new(mode, &jump(A), &UD2).bad(t, GP, A, CAUSE);
        World::new(mode, &call(A), &UD2).bad(t, GP, A, CAUSE);
    });
    each("not_present", |t, mode| {
        let world = World::new(mode, &jump(B), &UD2);
        tss_descriptor(B, TSS_B, 0x67, TSS32 & !0x80);
        world.bad(t, NP, B, CAUSE);
        t.eq("the first TSS is busy still", machine::descriptor(A) & BUSY, BUSY);
        t.eq("saved EIP, which there is none of", saved(TSS_A, 0x20), 0u32);
    });
    each("gate_not_present", |t, mode| {
        let world = World::new(mode, &jump(EXTRA), &UD2);
        machine::set_descriptor(EXTRA, task_gate(B, GATE & !0x80));
        world.bad(t, NP, EXTRA, CAUSE);
    });
    each("gate_to_busy", |t, mode| {
        let world = World::new(mode, &jump(EXTRA), &UD2);
        machine::set_descriptor(EXTRA, task_gate(A, GATE));
        world.bad(t, GP, A, CAUSE);
    });
    each("gate_to_data", |t, mode| {
        let world = World::new(mode, &jump(EXTRA), &UD2);
        machine::set_descriptor(EXTRA, task_gate(DATA, GATE));
        world.bad(t, GP, DATA, CAUSE);
    });
    each("limit_too_small", |t, mode| {
        let world = World::new(mode, &jump(B), &UD2);
        tss_descriptor(B, TSS_B, 0x66, TSS32);
        world.bad(t, TS, B, CAUSE);
        let mut world = World::new(mode, &jump(B), &UD2);
        world.b.segments[STACK] = DATA16;
        world.b.write16(TSS_B);
        tss_descriptor(B, TSS_B, 0x2a, TSS16);
        world.bad(t, TS, B, CAUSE);
    });
    each("int_n_to_busy", |t, mode| {
        let world = World::new(mode, &[0xcd, 0x21, 0xc3], &UD2);
        modes::set_gate32(0x21, task_gate(A, GATE));
        world.bad(t, GP, A, CAUSE);
    });
    each("int_n_to_not_present", |t, mode| {
        let world = World::new(mode, &[0xcd, 0x21, 0xc3], &UD2);
        tss_descriptor(B, TSS_B, 0x67, TSS32 & !0x80);
        modes::set_gate32(0x21, task_gate(B, GATE));
        world.bad(t, NP, B, CAUSE);
    });
    // pushfd; or [esp], NT; popfd; iret
    const NESTED: [u8; 10] = [0x9c, 0x81, 0x0c, 0x24, 0, 0x40, 0, 0, 0x9d, 0xcf];
    for (name, link) in [
        ("iret_to_null", 0),
        ("iret_to_data", DATA),
        ("iret_to_available", B),
        ("iret_to_ldt", B | 4),
        ("iret_beyond_the_gdt", 0x800),
    ] {
        each(name, |t, mode| {
            let world = World::new(mode, &NESTED, &UD2);
            poke(TSS_A, link);
            world.bad(t, TS, link, CAUSE + 9);
        });
    }
    each("iret_to_not_present", |t, mode| {
        let world = World::new(mode, &NESTED, &UD2);
        tss_descriptor(B, TSS_B, 0x67, TSS32 & !0x80 | 2);
        poke(TSS_A, B);
        world.bad(t, NP, B, CAUSE + 9);
    });
}

fn failures_inside() {
    let segments: [(&str, usize, u16, u8); 8] = [
        ("inside.cs_null", CS, 0, TS),
        ("inside.cs_is_data", CS, DATA, TS),
        ("inside.cs_beyond_the_gdt", CS, 0x800, TS),
        ("inside.cs_of_other_level", CS, USER_CODE32 & !3, TS),
        ("inside.ss_null", STACK, 0, TS),
        ("inside.ss_is_code", STACK, machine::CODE32, TS),
        ("inside.ss_of_other_level", STACK, USER_DATA, TS),
        ("inside.ds_is_a_tss", DS, A, TS),
    ];
    for (name, register, selector, vector) in segments {
        each(name, |t, mode| {
            let mut world = World::new(mode, &jump(B), &UD2);
            world.b.segments[register] = selector;
            world.b.write32(TSS_B);
            world.fails_inside(t, vector, selector & !3);
        });
    }
    each("inside.es_not_present", |t, mode| {
        let mut world = World::new(mode, &jump(B), &UD2);
        machine::set_descriptor(EXTRA, 0x00cf_1300_0000_ffff);
        world.b.segments[ES] = EXTRA;
        world.b.write32(TSS_B);
        world.fails_inside(t, NP, EXTRA);
    });
    each("inside.cs_not_present", |t, mode| {
        let mut world = World::new(mode, &jump(B), &UD2);
        machine::set_descriptor(EXTRA, 0x00cf_1b00_0000_ffff);
        world.b.segments[CS] = EXTRA;
        world.b.write32(TSS_B);
        world.fails_inside(t, NP, EXTRA);
    });
    each("inside.ss_not_present", |t, mode| {
        if t.skip_on_tcg("a stack segment that is not present is #NP") {
            return;
        }
        let mut world = World::new(mode, &jump(B), &UD2);
        machine::set_descriptor(EXTRA, 0x00cf_1300_0000_ffff);
        world.b.segments[STACK] = EXTRA;
        world.b.write32(TSS_B);
        world.fails_inside(t, SS, EXTRA);
    });
    each("inside.ldt_is_none", |t, mode| {
        let mut world = World::new(mode, &jump(B), &UD2);
        world.b.ldt = DATA;
        world.b.write32(TSS_B);
        world.fails_inside(t, TS, DATA);
    });
    each("inside.ldt_not_present", |t, mode| {
        let mut world = World::new(mode, &jump(B), &UD2);
        machine::set_descriptor(EXTRA, 0x0000_0200_0000_0000 | LDT << 16 | 0xf);
        world.b.ldt = EXTRA;
        world.b.write32(TSS_B);
        world.fails_inside(t, TS, EXTRA);
    });
    each("inside.next_instruction_faults", |t, mode| {
        // Not the switch but the first instruction of the task.
        let mut world = World::new(mode, &jump(B), &UD2);
        world.b.eip = ENDING;
        world.b.write32(TSS_B);
        world.bad(t, UD, 0, ENDING);
    });
}

fn ring_3() {
    each("ring_3.jump_and_back", |t, mode| {
        let world = World::new(mode, &jump(B), &jump(A));
        world.b.user().write32(TSS_B);
        tss_descriptor(A, TSS_A, 0x67, TSS32 | 0x60);
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.eq("CS inside", record.segments[CS], USER_CODE32);
        t.eq("SS inside", record.segments[STACK], USER_DATA);
        t.eq("saved CS of the other", saved(TSS_B, 0x4c), u32::from(USER_CODE32));
    });
    each("ring_3.call_and_iret", |t, mode| {
        let world = World::new(mode, &call(B), &IRET);
        world.b.user().write32(TSS_B);
        let (outcome, record) = world.good(t);
        t.check(outcome.registers == REGISTERS, format_args!("{REGISTERS:x?}, got {:x?}", outcome.registers));
        t.eq("CS inside", record.segments[CS], USER_CODE32);
    });
    each("ring_3.level_of_the_tss", |t, mode| {
        let world = World::new(mode, &jump(B), &jump(A));
        world.b.user().write32(TSS_B);
        let record = world.bad(t, GP, A, ENDING);
        t.eq("CS inside", record.segments[CS], USER_CODE32);
    });
    each("ring_3.int_n", |t, mode| {
        if skip_by_instruction(t) {
            return;
        }
        let world = World::new(mode, &jump(B), &[0xcd, 0x21]);
        world.b.user().write32(TSS_B);
        modes::set_gate32(0x21, task_gate(A, GATE | 0x60));
        let (outcome, _) = world.good(t);
        t.eq("NT of the first task", outcome.eflags & NT, NT);
        t.eq("its back link", peek::<u16>(TSS_A), B);
        t.eq("saved EIP of the other, behind INT", saved(TSS_B, 0x20), ENDING + 2);
        t.eq("the other is busy still", machine::descriptor(B) & BUSY, BUSY);
    });
    each("ring_3.int_n_level_of_the_gate", |t, mode| {
        let world = World::new(mode, &jump(B), &[0xcd, 0x21]);
        world.b.user().write32(TSS_B);
        modes::set_gate32(0x21, task_gate(A, GATE));
        world.bad(t, GP, 0x21 * 8 + 2, ENDING);
    });
    each("ring_3.exception", |t, mode| {
        let world = World::new(mode, &jump(B), &UD2);
        world.b.user().write32(TSS_B);
        modes::set_gate32(UD, task_gate(A, GATE));
        world.good(t);
        t.eq("saved EIP of the other", saved(TSS_B, 0x20), ENDING);
        t.eq("saved CS of the other", saved(TSS_B, 0x4c), u32::from(USER_CODE32));
    });
}

/// There are no task switches in long mode. Intel SDM vol. 3, 7.7; AMD APM vol. 2, 12.3.
fn long() {
    case("compat.jump_to_tss", |t| {
        let mut world = World::new(Mode::Compat, &jump(B), &UD2);
        code(PAYLOAD, &[0x90, 0x90, 0x90]);
        world.registers.ecx = 0;
        world.bad(t, GP, B, CAUSE);
    });
    case("compat.jump_to_task_gate", |t| {
        let mut world = World::new(Mode::Compat, &jump(EXTRA), &UD2);
        code(PAYLOAD, &[0x90, 0x90, 0x90]);
        world.registers.ecx = 0;
        machine::set_descriptor(EXTRA, task_gate(B, GATE));
        world.bad(t, GP, EXTRA, CAUSE);
    });
    case("long.iret_with_nt", |t| {
        let got = guests::trap::catch(|| exec!("pushfq", "or dword ptr [rsp], 0x4000", "popfq", "iretq"));
        t.faults("IRETQ", got, GP, Some(0));
    });
}
