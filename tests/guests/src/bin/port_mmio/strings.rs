//! INS and OUTS: sizes, directions, segments, page boundaries, faults in the middle.
use guests::dev::fw_cfg;
use guests::frames::PAGE;
use guests::paging::{Space, E_W, P, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, Eoi, PF};
use guests::{exec, Racy};

const SCRATCH: u16 = 0x3ff;
const DATA: u16 = fw_cfg::PORT + 1;

static BUFFER: Racy<[u8; 64]> = Racy::new([0; 64]);

fn select() {
    outw(fw_cfg::PORT, fw_cfg::SIGNATURE);
}

fn with_fw_cfg(name: &str, run: impl FnOnce(&mut Case)) {
    case(name, |t| if fw_cfg::present() { run(t) } else { t.skip("no fw_cfg") });
}

fn fill(address: u64, bytes: &[u8]) {
    bytes.iter().enumerate().for_each(|(at, &byte)| poke(address + at as u64, byte));
}

pub(crate) fn run() {
    ins();
    outs();
    boundaries();
    faults();
}

fn ins() {
    with_fw_cfg("ins.bytes", |t| {
        select();
        fill(BUFFER.addr(), &[0x11; 8]);
        let (rcx, rdi): (u64, u64);
        exec!("rep insb", inout("rcx") 4u64 => rcx, inout("rdi") BUFFER.addr() => rdi, in("dx") DATA);
        t.eq("the bytes", peek::<u32>(BUFFER.addr()), u32::from_le_bytes(*b"QEMU"));
        t.eq("the byte behind them", peek::<u8>(BUFFER.addr() + 4), 0x11u8);
        t.eq("RCX", rcx, 0u64);
        t.eq("RDI", rdi, BUFFER.addr() + 4);
    });
    with_fw_cfg("ins.bytes_downward", |t| {
        select();
        let rdi: u64;
        exec!("std", "rep insb", "cld", inout("rcx") 4u64 => _, inout("rdi") BUFFER.addr() + 3 => rdi, in("dx") DATA);
        t.eq("the bytes", peek::<u32>(BUFFER.addr()), u32::from_be_bytes(*b"QEMU"));
        t.eq("RDI", rdi, BUFFER.addr() - 1);
    });
    with_fw_cfg("ins.single", |t| {
        select();
        let (rcx, rdi): (u64, u64);
        exec!("insb", inout("rcx") 7u64 => rcx, inout("rdi") BUFFER.addr() => rdi, in("dx") DATA);
        t.eq("the byte", peek::<u8>(BUFFER.addr()), b'Q');
        t.eq("RCX, which only REP uses", rcx, 7u64);
        t.eq("RDI", rdi, BUFFER.addr() + 1);
    });
    case("ins.words", |t| {
        fill(BUFFER.addr(), &[0; 16]);
        let rdi: u64;
        exec!("rep insw", inout("rcx") 3u64 => _, inout("rdi") BUFFER.addr() => rdi, in("dx") 0x1e8u16);
        t.eq("six bytes of ones", peek::<u64>(BUFFER.addr()), 0xffff_ffff_ffffu64);
        t.eq("RDI", rdi, BUFFER.addr() + 6);
    });
    case("ins.dwords", |t| {
        outl(0xcf8, 0x8000_0000);
        let id = inl(0xcfc);
        let rdi: u64;
        exec!("rep insd", inout("rcx") 4u64 => _, inout("rdi") BUFFER.addr() => rdi, in("dx") 0xcfcu16);
        for index in 0..4 {
            t.eq("the host bridge's id", peek::<u32>(BUFFER.addr() + 4 * index), id);
        }
        t.eq("RDI", rdi, BUFFER.addr() + 16);
    });
    case("ins.zero_count", |t| {
        let (rcx, rdi): (u64, u64);
        // RDI is not even mapped: nothing may be touched.
        exec!("rep insb", inout("rcx") 0u64 => rcx, inout("rdi") PLAYGROUND => rdi, in("dx") 0x21u16);
        t.eq("RCX", rcx, 0u64);
        t.eq("RDI", rdi, PLAYGROUND);
    });
    with_fw_cfg("ins.address_size_32", |t| {
        select();
        let (rcx, rdi): (u64, u64);
        exec!(".byte 0x67, 0xf3, 0x6c", inout("rcx") 0x1_0000_0002u64 => rcx,
            inout("rdi") 0xdead_0000_0000u64 | BUFFER.addr() => rdi, in("dx") DATA);
        t.eq("the bytes", peek::<u16>(BUFFER.addr()), u16::from_le_bytes(*b"QE"));
        t.eq("ECX", rcx as u32, 0u32);
        t.eq("EDI", rdi as u32, BUFFER.addr() as u32 + 2);
    });
    with_fw_cfg("ins.repne_is_rep", |t| {
        select();
        exec!(".byte 0xf2, 0x6c", inout("rcx") 4u64 => _, inout("rdi") BUFFER.addr() => _, in("dx") DATA);
        t.eq("the bytes", peek::<u32>(BUFFER.addr()), u32::from_le_bytes(*b"QEMU"));
    });
    case("ins.long", |t| {
        let base = PLAYGROUND + 0x1_0000;
        for page in 0..4 {
            Space::current().map_new(base + page * PAGE, P | W);
        }
        exec!("rep insb", inout("rcx") 4 * PAGE => _, inout("rdi") base => _, in("dx") 0x1e8u16);
        t.yes("four pages of ones", (0..4 * PAGE / 8).all(|word| peek::<u64>(base + 8 * word) == !0));
    });
}

fn outs() {
    case("outs.bytes", |t| {
        fill(BUFFER.addr(), &[1, 2, 3, 4, 5]);
        let (rcx, rsi): (u64, u64);
        exec!("rep outsb", inout("rcx") 4u64 => rcx, inout("rsi") BUFFER.addr() => rsi, in("dx") SCRATCH);
        t.eq("the last byte", inb(SCRATCH), 4u8);
        t.eq("RCX", rcx, 0u64);
        t.eq("RSI", rsi, BUFFER.addr() + 4);
    });
    case("outs.bytes_downward", |t| {
        fill(BUFFER.addr(), &[1, 2, 3, 4, 5]);
        let rsi: u64;
        exec!("std", "rep outsb", "cld", inout("rcx") 4u64 => _, inout("rsi") BUFFER.addr() + 4 => rsi, in("dx") SCRATCH);
        t.eq("the last byte", inb(SCRATCH), 2u8);
        t.eq("RSI", rsi, BUFFER.addr());
    });
    with_fw_cfg("outs.words", |t| {
        // Two selectors, the last of which counts.
        fill(BUFFER.addr(), &[5, 0, 0, 0]);
        exec!("rep outsw", inout("rcx") 2u64 => _, inout("rsi") BUFFER.addr() => _, in("dx") fw_cfg::PORT);
        let got: [u8; 4] = core::array::from_fn(|_| inb(DATA));
        t.check(&got == b"QEMU", format_args!("`QEMU`, got {got:?}"));
    });
    case("outs.dwords", |t| {
        for index in 0..3u64 {
            poke(BUFFER.addr() + 4 * index, 0x8000_0000u32 + 4 * index as u32);
        }
        exec!("rep outsd", inout("rcx") 3u64 => _, inout("rsi") BUFFER.addr() => _, in("dx") 0xcf8u16);
        t.eq("CONFIG_ADDRESS", inl(0xcf8), 0x8000_0008u32);
    });
    case("outs.segment_override", |t| {
        fill(BUFFER.addr(), &[0xa1, 0xa2, 0xa3, 0xa4]);
        let old = rdmsr(MSR_FS_BASE);
        wrmsr(MSR_FS_BASE, BUFFER.addr() - 0x1000);
        exec!(".byte 0x64, 0xf3, 0x6e", inout("rcx") 3u64 => _, inout("rsi") 0x1000u64 => _, in("dx") SCRATCH);
        wrmsr(MSR_FS_BASE, old);
        t.eq("the last byte through FS", inb(SCRATCH), 0xa3u8);
        let old = rdmsr(MSR_GS_BASE);
        wrmsr(MSR_GS_BASE, BUFFER.addr() - 0x2000);
        exec!(".byte 0x65, 0x6e", inout("rsi") 0x2000u64 => _, in("dx") SCRATCH);
        wrmsr(MSR_GS_BASE, old);
        t.eq("the byte through GS", inb(SCRATCH), 0xa1u8);
    });
    case("outs.address_size_32", |t| {
        fill(BUFFER.addr(), &[7, 8, 9]);
        let (rcx, rsi): (u64, u64);
        exec!(".byte 0x67, 0xf3, 0x6e", inout("rcx") 0x1_0000_0003u64 => rcx,
            inout("rsi") 0xdead_0000_0000u64 | BUFFER.addr() => rsi, in("dx") SCRATCH);
        t.eq("the last byte", inb(SCRATCH), 9u8);
        t.eq("ECX", rcx as u32, 0u32);
        t.eq("ESI", rsi as u32, BUFFER.addr() as u32 + 3);
    });
    case("outs.zero_count", |t| {
        let rsi: u64;
        exec!("rep outsb", inout("rcx") 0u64 => _, inout("rsi") PLAYGROUND => rsi, in("dx") 0x80u16);
        t.eq("RSI", rsi, PLAYGROUND);
    });
}

/// Two neighbouring pages backed by frames that are not neighbours.
fn two_pages(base: u64) {
    let space = Space::current();
    space.map_new(base, P | W);
    guests::frames::page();
    space.map_new(base + PAGE, P | W);
}

/// Why cases about the address of a page fault that a hypervisor injects do not apply.
const CR2_IS_LOST: &str = "VMRUN does not load CR2, so that an injected page fault has another's address";

fn boundaries() {
    with_fw_cfg("ins.across_pages", |t| {
        let base = PLAYGROUND + 0x2_0000;
        two_pages(base);
        select();
        exec!("rep insb", inout("rcx") 4u64 => _, inout("rdi") base + PAGE - 2 => _, in("dx") DATA);
        t.eq("the first two", peek::<u16>(base + PAGE - 2), u16::from_le_bytes(*b"QE"));
        t.eq("the other two", peek::<u16>(base + PAGE), u16::from_le_bytes(*b"MU"));
    });
    case("ins.element_across_pages", |t| {
        let base = PLAYGROUND + 0x3_0000;
        two_pages(base);
        outl(0xcf8, 0x8000_0000);
        let id = inl(0xcfc);
        exec!("insd", inout("rdi") base + PAGE - 1 => _, in("dx") 0xcfcu16);
        t.eq("the first byte", peek::<u8>(base + PAGE - 1), id & 0xff);
        t.eq("the other three", peek::<u32>(base + PAGE) & 0xff_ffff, id >> 8);
    });
    case("outs.element_across_pages", |t| {
        let base = PLAYGROUND + 0x4_0000;
        two_pages(base);
        fill(base + PAGE - 2, &[0x08, 0x00, 0x00, 0x80]);
        exec!("outsd", inout("rsi") base + PAGE - 2 => _, in("dx") 0xcf8u16);
        t.eq("CONFIG_ADDRESS", inl(0xcf8), 0x8000_0008u32);
    });
}

fn faults() {
    static LEFT: Racy<u64> = Racy::new(0);
    fn fix() {
        trap::on(PF, Eoi::None, |frame| {
            poke(LEFT.addr(), frame.rcx);
            Space::current().map_new(cr2() & !(PAGE - 1), P | W);
        });
    }
    with_fw_cfg("ins.page_fault_in_the_middle", |t| {
        if t.skip_on_bochs_svm(CR2_IS_LOST) {
            return;
        }
        let base = PLAYGROUND + 0x5_0000;
        Space::current().map_new(base, P | W);
        fix();
        select();
        let (rcx, rdi): (u64, u64);
        exec!("rep insb", inout("rcx") 4u64 => rcx, inout("rdi") base + PAGE - 2 => rdi, in("dx") DATA);
        t.eq("page faults", trap::count(PF), 1u32);
        t.eq("RCX at the fault", peek::<u64>(LEFT.addr()), 2u64);
        t.eq("the first two", peek::<u16>(base + PAGE - 2), u16::from_le_bytes(*b"QE"));
        // No byte may be taken from the port and then lost to the fault.
        t.eq("the other two", peek::<u16>(base + PAGE), u16::from_le_bytes(*b"MU"));
        t.eq("RCX", rcx, 0u64);
        t.eq("RDI", rdi, base + PAGE + 2);
    });
    case("outs.page_fault_in_the_middle", |t| {
        if t.skip_on_bochs_svm(CR2_IS_LOST) {
            return;
        }
        let base = PLAYGROUND + 0x6_0000;
        Space::current().map_new(base, P | W);
        fill(base + PAGE - 3, &[0x31, 0x32, 0x33]);
        fix();
        let (rcx, rsi): (u64, u64);
        exec!("rep outsb", inout("rcx") 5u64 => rcx, inout("rsi") base + PAGE - 3 => rsi, in("dx") SCRATCH);
        t.eq("page faults", trap::count(PF), 1u32);
        t.eq("RCX at the fault", peek::<u64>(LEFT.addr()), 2u64);
        t.eq("the last byte, from the fresh page", inb(SCRATCH), 0u8);
        t.eq("RCX", rcx, 0u64);
        t.eq("RSI", rsi, base + PAGE + 2);
    });
    case("ins.fault_code_and_address", |t| {
        if t.skip_on_bochs_svm(CR2_IS_LOST) {
            return;
        }
        let got = trap::catch(|| exec!("insb", inout("rdi") PLAYGROUND + 0x7_0123 => _, in("dx") 0x21u16));
        let fault = t.faults("INSB to a page that is not there", got, PF, Some(E_W));
        t.eq("CR2", fault.cr2, PLAYGROUND + 0x7_0123);
    });
    case("outs.fault_code_and_address", |t| {
        if t.skip_on_bochs_svm(CR2_IS_LOST) {
            return;
        }
        outb(SCRATCH, 0x99);
        let got = trap::catch(|| exec!("outsb", inout("rsi") PLAYGROUND + 0x7_0456 => _, in("dx") SCRATCH));
        let fault = t.faults("OUTSB from a page that is not there", got, PF, Some(0));
        t.eq("CR2", fault.cr2, PLAYGROUND + 0x7_0456);
        t.eq("the scratch register, not written", inb(SCRATCH), 0x99u8);
    });
    case("ins.read_only_page", |t| {
        Space::current().map_new(PLAYGROUND + 0x8_0000, P);
        let got = trap::catch(|| exec!("insb", inout("rdi") PLAYGROUND + 0x8_0000 => _, in("dx") 0x21u16));
        t.faults("INSB to a read-only page", got, PF, Some(E_W | 1));
    });
    case("ins.noncanonical", |t| {
        let got = trap::catch(|| exec!("insb", inout("rdi") 0x8000_0000_0000u64 => _, in("dx") 0x21u16));
        t.faults("INSB to a non-canonical address", got, trap::GP, Some(0));
    });
}
