//! A CPU with descriptor tables, for tests of what reads them.
use super::fake::{FakeCpu, RAM};
use crate::hw::TableRegister;
use crate::vm::emulate::{Attributes, Exception, Gpr, Mode, Outcome, Seg};

/// GDT, IDT and task state in the fake CPU's RAM; stacks below [`STACK`] and [`INNER`].
pub(super) const GDT: u64 = RAM;
pub(super) const IDT: u64 = RAM + 0x800;
pub(super) const TSS: u64 = RAM + 0x3000;
pub(super) const STACK: u64 = RAM + 0x2000;
pub(super) const INNER: u64 = RAM + 0x2800;

/// Selectors of the GDT that [`world`] makes, all with RPL 0.
pub(super) const CODE0: u16 = 0x08;
pub(super) const DATA0: u16 = 0x10;
pub(super) const CODE3: u16 = 0x18;
pub(super) const DATA3: u16 = 0x20;
pub(super) const CONFORMING: u16 = 0x28;
/// 64-bit code, level 0 and 3.
pub(super) const LONG0: u16 = 0x30;
pub(super) const LONG3: u16 = 0x38;
pub(super) const TASK: u16 = 0x40;
/// Free for a test; two slots for 16-byte descriptors.
pub(super) const SLOT: u16 = 0x50;
pub(super) const SLOT2: u16 = 0x60;
pub(super) const SLOT3: u16 = 0x70;

/// A flat 4 GiB segment with `access` (P, DPL, S, type); `flags` are G, D/B, L, AVL.
pub(super) fn flat(access: u8, flags: u8) -> u64 {
    0xffff | u64::from(access) << 40 | 0xf << 48 | u64::from(flags) << 52
}

/// A system segment.
pub(super) fn system(access: u8, base: u64, limit: u32) -> u64 {
    let limit = u64::from(limit);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// A gate; `count` is the number of parameters, or the IST.
pub(super) fn gate(access: u8, selector: u16, offset: u64, count: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(access) << 40
        | (offset >> 16 & 0xffff) << 48
}

/// A CPU at `cpl` with the tables of this module, accessed bits set, a 32- or 64-bit TSS with stack [`INNER`] for
/// level 0.
pub(super) fn world(mode: Mode, cpl: u8) -> FakeCpu {
    let mut cpu = FakeCpu::new(mode);
    let long = mode == Mode::Long64;
    for (selector, descriptor) in [
        (CODE0, flat(0x9b, 0xc)),
        (DATA0, flat(0x93, 0xc)),
        (CODE3, flat(0xfb, 0xc)),
        (DATA3, flat(0xf3, 0xc)),
        (CONFORMING, flat(0x9f, 0xc)),
        (LONG0, flat(0x9b, 0xa)),
        (LONG3, flat(0xfb, 0xa)),
        (TASK, system(0x8b, TSS, 0x67)),
    ] {
        cpu.poke(GDT + u64::from(selector), 8, descriptor);
    }
    cpu.gdtr = TableRegister { base: GDT, limit: 0x7f };
    cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
    cpu.cpl = cpl;
    let level = u16::from(cpl);
    let (code, data) = match (long, cpl) {
        (true, 0) => (LONG0, DATA0),
        (true, _) => (LONG3, DATA3),
        (false, 0) => (CODE0, DATA0),
        (false, _) => (CODE3, DATA3),
    };
    if !matches!(mode, Mode::Real | Mode::Vm86) {
        for (seg, selector) in [(Seg::Cs, code), (Seg::Ss, data)] {
            let segment = &mut cpu.segments[seg as usize];
            segment.selector = selector | level;
            segment.attributes = Attributes(segment.attributes.0 | level << 5);
        }
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            cpu.segments[seg as usize].selector = DATA3 | 3;
            cpu.segments[seg as usize].attributes = Attributes(0xcf3);
        }
    }
    cpu.segments[Seg::Tr as usize].selector = TASK;
    if long {
        cpu.poke(TSS + 4, 8, INNER);
    } else {
        cpu.poke(TSS + 4, 4, INNER);
        cpu.poke(TSS + 8, 2, DATA0.into());
    }
    cpu[Gpr::Rsp] = STACK;
    cpu
}

/// Puts `descriptor` into the GDT.
pub(super) fn put(cpu: &mut FakeCpu, selector: u16, descriptor: u64) {
    cpu.poke(GDT + u64::from(selector & !7), 8, descriptor);
}

/// An exception with an error code.
pub(super) fn exception(vector: u8, code: u32) -> Outcome {
    Outcome::Exception(Exception { vector, error_code: Some(code), cr2: None })
}

pub(super) const DONE: Outcome = Outcome::Done { trap: false };
