//! A guest that misbehaves; the command line says how. What becomes of it does not matter, the hypervisor must live.
//!
//! `jump` runs garbage without an IDT; `triple` triple-faults; `wild` runs pseudo-random bytes (`seed=N`, `rounds=N`);
//! `flood` exits as fast as it can; `hostile-npt` (`variant=NAME`, or all that return) lets tables, stacks and
//! descriptor tables lie where no RAM is. Each prints what it is about to do; those that come to an end report it.
#![no_std]
#![no_main]
// Everything here is unsafe on purpose.
#![allow(unsafe_code)]
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
use guests::dev::{ioapic, lapic, pit};
use guests::frames::{self, PAGE};
use guests::multiboot::boot;
use guests::paging::{Space, P, PLAYGROUND, PS, U, W};
use guests::prelude::*;
use guests::report::{self, case};
use guests::trap::{self, catch, Eoi};
use guests::{exec, machine, main, println};

main!(run);

fn run() {
    if boot().word("jump") {
        jump();
    } else if boot().word("triple") {
        triple();
    } else if boot().word("wild") {
        wild();
    } else if boot().word("flood") {
        flood();
    } else if boot().word("hostile-npt") {
        hostile();
    } else {
        report::abort(format_args!(
            "garbage: expected one of jump, triple, wild, flood, hostile-npt on the command line, got none"
        ));
    }
}

fn number(key: &str, default: u64) -> u64 {
    boot().value(key).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Marsaglia's xorshift: the same bytes for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn no_idt() {
    trap::load_idt(0, 0);
}

fn jump() {
    println!("jumping to garbage without an IDT");
    let page = frames::page();
    let mut random = Random(number("seed", 1) | 1);
    // Two variants: all ones, which is an undefined opcode, and noise.
    for word in 0..PAGE / 8 {
        poke(page + word * 8, if boot().word("noise") { random.next() } else { !0 });
    }
    no_idt();
    exec!("jmp {}", in(reg) page, options(noreturn));
}

fn triple() {
    println!("triple fault");
    no_idt();
    exec!("ud2", options(noreturn));
}

static NMIS: AtomicU32 = AtomicU32::new(0);

/// Lets the PIT send NMIs on a stack of their own. Each ends what runs; many without a new call of this say that the
/// way back is gone, and end the program, so that no misdeed lasts for ever.
fn watchdog() {
    NMIS.store(0, SeqCst);
    trap::ist(trap::NMI, 3);
    trap::on(trap::NMI, Eoi::None, |frame| {
        if NMIS.fetch_add(1, SeqCst) > 40 {
            println!("lost control");
            report::exit(0);
        }
        trap::unwind(frame);
    });
    ioapic::set_entry(2, 4 << 8);
    pit::program(0, 2, 20_000);
}

fn wild() {
    let (seed, rounds) = (number("seed", 1), number("rounds", 2000));
    println!("running pseudo-random bytes, seed {seed}");
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let page = frames::pages(2);
    let scratch = frames::pages(4);
    for vector in 32..=255u8 {
        // Whatever interrupt comes ends the round.
        trap::on(vector, Eoi::Lapic, |frame| _ = trap::unwind(frame));
    }
    for vector in [trap::PF, trap::GP, trap::UD, trap::SS, trap::DB] {
        trap::ist(vector, 2);
    }
    for round in 0..rounds {
        watchdog();
        for word in 0..32 {
            poke(page + word * 8, random.next());
        }
        // INT3 behind it.
        for word in 32..PAGE / 8 {
            poke(page + word * 8, 0xcccc_cccc_cccc_ccccu64);
        }
        lapic::timer(0x40, lapic::DIVIDE_1, 1_000_000);
        let registers: [u64; 4] = core::array::from_fn(|_| match random.next() % 3 {
            0 => scratch + random.next() % (2 * PAGE),
            1 => random.next() & 0xffff_ffff,
            _ => random.next() & 0xffff,
        });
        let _ = catch(|| {
            exec!("push rbx", "push rbp", "sub rsp, 0x800", "mov rbx, rsi", "sti", "call {page}", "cli", "add rsp, 0x800",
                "pop rbp", "pop rbx",
                page = in(reg) page, inout("rax") registers[0] => _, inout("rsi") registers[1] => _,
                inout("rdi") registers[2] => _, inout("rcx") registers[3] => _, out("rdx") _, out("r8") _, out("r9") _,
                out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _)
        });
        // The state that a round may have bent; if it cannot be put right, that is the end, as it should be.
        cli();
        exec!("cld");
        set_cr0(machine::base_cr0());
        set_cr3(machine::base_cr3());
        trap::load();
        if round % 256 == 0 {
            println!("round {round}");
        }
    }
    println!("all rounds done");
    report::exit(0);
}

fn flood() {
    let rounds = number("rounds", 20_000);
    case("flood.cpuid", |t| {
        (0..rounds).for_each(|_| _ = cpuid(0, 0));
        t.yes("the end", true);
    });
    case("flood.ports", |t| {
        (0..rounds).for_each(|round| outb(0x80, inb(round as u16)));
        t.yes("the end", true);
    });
    case("flood.all_ports_read", |t| {
        (0..=u16::MAX).for_each(|port| _ = inb(port));
        t.yes("the end", true);
    });
    case("flood.mmio", |t| {
        (0..rounds).for_each(|round| poke(ioapic::REGSEL, round as u32));
        (0..rounds).for_each(|_| _ = peek::<u32>(lapic::BASE + 0x20));
        t.yes("the end", true);
    });
    case("flood.msrs", |t| {
        (0..rounds as u32).for_each(|msr| _ = try_rdmsr(msr));
        t.yes("the end", true);
    });
    case("flood.self_ipis", |t| {
        trap::expect(0x50, Eoi::Lapic);
        sti();
        (0..rounds).for_each(|_| lapic::self_ipi(0x50));
        cli();
        t.yes("arrivals", trap::count(0x50) > 0);
    });
    case("flood.timers", |t| {
        // The shortest periods of all: an interrupt storm that must not starve anyone.
        trap::expect(0x50, Eoi::Lapic);
        trap::expect(0x20, Eoi::Master);
        ioapic::set_entry(2, 0x51);
        trap::expect(0x51, Eoi::Lapic);
        pit::program(0, 2, 2);
        lapic::timer(lapic::PERIODIC | 0x50, lapic::DIVIDE_1, 1);
        sti();
        for _ in 0..200 {
            cpuid(0, 0);
        }
        cli();
        lapic::write(lapic::TMICT, 0);
        pit::stop();
        t.yes("the end", true);
    });
    case("flood.unclaimed_mmio", |t| {
        (0..rounds).for_each(|round| _ = peek::<u32>(0xd000_0000 + round % 1024 * 4));
        t.yes("the end", true);
    });
    case("flood.host_bridge", |t| {
        for round in 0..rounds as u32 {
            outl(0xcf8, 0x8000_0000 | round.wrapping_mul(0x0010_0404) & 0x00ff_fffc);
            inl(0xcfc);
        }
        t.yes("the end", true);
    });
}

/// Something that ends the guest if the processor behaves: named by `variant=`.
fn deadly(variant: &str) -> bool {
    let hole = 0xd000_0000u64;
    let beyond = 1u64 << (machine::physical_bits() - 1);
    match variant {
        "cr3-in-mmio" => set_cr3(ioapic::BASE),
        "cr3-in-lapic" => set_cr3(lapic::BASE),
        "cr3-in-hole" => set_cr3(hole),
        "cr3-beyond-ram" => set_cr3(beyond),
        "cr3-in-rom" => set_cr3(0xf_0000),
        // Where Umbra keeps what old Intel processors need.
        "cr3-in-reserved-pages" => set_cr3(0xfffb_c000),
        "idt-in-mmio" => {
            trap::load_idt(ioapic::BASE, 4095);
            exec!("ud2");
        }
        "idt-in-hole" => {
            trap::load_idt(hole, 4095);
            exec!("ud2");
        }
        "gdt-in-mmio" => {
            let pointer = trap::pseudo_descriptor(ioapic::BASE, 127);
            exec!("lgdt [{}]", in(reg) &pointer);
            exec!("int3");
        }
        "stack-in-mmio" => exec!("mov rsp, {}", "int3", in(reg) ioapic::BASE + 0x100, options(noreturn)),
        "stack-in-hole" => exec!("mov rsp, {}", "int3", in(reg) hole + 0x100, options(noreturn)),
        "tss-in-mmio" => {
            machine::set_tss_stack(2, lapic::BASE + 0x800);
            trap::ist(trap::UD, 2);
            exec!("ud2");
        }
        "code-in-mmio" => exec!("jmp {}", in(reg) ioapic::BASE, options(noreturn)),
        "code-in-lapic" => exec!("jmp {}", in(reg) lapic::BASE + 0x20, options(noreturn)),
        "code-in-hole" => exec!("jmp {}", in(reg) hole, options(noreturn)),
        "code-beyond-ram" => {
            Space::current().map(PLAYGROUND, beyond, 1, P | W);
            exec!("jmp {}", in(reg) PLAYGROUND, options(noreturn))
        }
        _ => return false,
    }
    true
}

fn hostile() {
    if let Some(variant) = boot().value("variant") {
        println!("hostile: {variant}");
        watchdog();
        match catch(|| deadly(variant)) {
            Ok(true) => println!("went on after {variant}"),
            Ok(false) => {
                report::abort(format_args!("hostile-npt: expected a variant that exists, got {variant}"))
            }
            Err(fault) => println!("{variant} ended in {fault}"),
        }
        report::exit(0);
    }
    // What comes back, as a value or as a fault: both are fine.
    let space = Space::current();
    let targets =
        [ioapic::BASE, lapic::BASE, 0xd000_0000, 0xf_0000, 1 << (machine::physical_bits() - 1), 0xb_8000];
    for (name, level) in [("hostile.page_table", 2), ("hostile.page_directory", 3), ("hostile.pdpt", 4)] {
        case(name, |t| {
            for (index, &target) in targets.iter().enumerate() {
                let address = (0x2000_0000_0000u64 + ((index as u64) << 39)) + (u64::from(level) << 43);
                space.set(address, level, target | P | W | U);
                let _ = catch(|| peek::<u32>(address));
                let _ = catch(|| poke(address, 1u32));
                let _ = catch(|| exec!("call {}", in(reg) address));
                space.set(address, level, 0);
            }
            t.eq("CPUID still answers", cpuid(0, 0).eax, cpuid(0, 0).eax);
        });
    }
    case("hostile.pages_anywhere", |t| {
        for bit in 12..machine::physical_bits() {
            for (level, large) in [(1, 0), (2, PS), (3, PS)] {
                let size = 1u64 << (12 + 9 * (level - 1));
                // Only addresses that are not RAM: the point is what is not there.
                let physical = (1u64 << bit) & !(size - 1);
                if physical < 1 << 32 {
                    continue;
                }
                let address = 0x3000_0000_0000 + (u64::from(bit) << 39) + (u64::from(level) << 33);
                space.set(address, level, physical | large | P | W);
                let _ = catch(|| peek::<u64>(address));
                let _ = catch(|| peek::<u64>(address + 0xffc));
                space.set(address, level, 0);
            }
        }
        t.yes("the end", true);
    });
    case("hostile.tables_that_point_at_themselves", |t| {
        let root = space.root;
        let slot = 0x7f00_0000_0000u64;
        space.set(slot, 4, root | P | W);
        let index = slot >> 39 & 511;
        let own = index << 39 | index << 30 | index << 21 | index << 12;
        let got = catch(|| peek::<u64>(own + index * 8));
        space.set(slot, 4, 0);
        if let Some(got) = t.works("reading the table through itself", got) {
            t.masked("its own entry", got, root | P | W, !0x60);
        }
    });
    case("hostile.random_tables", |t| {
        let mut random = Random(number("seed", 1) | 1);
        for _ in 0..50 {
            let table = frames::page();
            for word in 0..512 {
                // Never RAM below 4 GiB: writes must not hit ourselves.
                poke(table + word * 8, random.next() | 1 << 39);
            }
            let address = 0x7000_0000_0000u64;
            space.set(address, 3, table | P | W | U);
            for _ in 0..50 {
                let at = address + random.next() % (1 << 30);
                let _ = catch(|| peek::<u8>(at));
                let _ = catch(|| exec!("call {}", in(reg) at));
            }
            space.set(address, 3, 0);
        }
        t.yes("the end", true);
    });
    case("hostile.mmio_with_every_instruction", |t| {
        // Two bytes of opcode and a ModRM byte that names memory, on a device page: whatever it is, it ends.
        let page = frames::page();
        space.map(PLAYGROUND + 0x10_0000, page, 1, P | W);
        let targets = [ioapic::BASE, 0xd000_0000u64];
        for opcode in 0..512u32 {
            // Not those that leave this code for good: far jumps, returns, HLT, IRET, SYSCALL and SYSRET, SYSEXIT, and
            // mode changes by MOV to control registers.
            let two = opcode >= 256;
            let byte = opcode as u8;
            let skipped = if two {
                matches!(
                    byte,
                    0x05 | 0x07 | 0x80..=0x8f | 0xc8..=0xcf | 0x20..=0x26 | 0x30 | 0x34 | 0x35 | 0x01 | 0x00 | 0x08 | 0x09 | 0x0b | 0xaa
                )
            } else {
                matches!(
                    byte,
                    0x0f | 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x68 | 0x6a | 0x6e..=0x7f | 0x8e | 0x8f | 0x94 | 0x9a
                        | 0x9c | 0x9d | 0xa0..=0xa3 | 0xb4 | 0xbc | 0xc2..=0xc5 | 0xc8..=0xcf | 0xe0..=0xe3
                        | 0xe6..=0xeb | 0xee..=0xf0 | 0xf2..=0xf4 | 0xf8..=0xfd | 0xff
                )
            };
            if skipped {
                continue;
            }
            for target in targets {
                let mut at = page;
                let mut put = |byte: u8| {
                    poke(at, byte);
                    at += 1;
                };
                if two {
                    put(0x0f);
                }
                put(byte);
                // ModRM: register AX, memory at RDI; then immediates that become NOPs or are consumed; then RET.
                put(0x07);
                (0..12).for_each(|_| put(0x90));
                put(0xc3);
                let _ = catch(|| {
                    exec!("push rbx", "push rbp", "sub rsp, 0x100", "xor eax, eax", "xor ecx, ecx", "inc ecx", "xor edx, edx",
                        "mov rsi, rdi", "call {page}", "add rsp, 0x100", "pop rbp", "pop rbx",
                        page = in(reg) PLAYGROUND + 0x10_0000, inout("rdi") target => _, out("rax") _, out("rcx") _,
                        out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _,
                        out("r13") _, out("r14") _, out("r15") _)
                });
                exec!("cld");
            }
        }
        t.yes("the end", true);
    });
}
