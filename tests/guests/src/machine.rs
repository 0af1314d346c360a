//! The machine's standard state: descriptor tables, control registers, quiet interrupt controllers. Each case starts
//! from it and leaves the way back to `baseline`.
use crate::cpu;
use crate::dev::{ioapic, lapic, pic};
use crate::prelude::*;
use crate::trap::{self, catch, pseudo_descriptor};
use crate::{exec, Racy};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Ring 0 64-bit code.
pub const CODE64: u16 = 0x08;
/// Ring 0 flat data.
pub const DATA: u16 = 0x10;
/// Ring 0 flat 32-bit code.
pub const CODE32: u16 = 0x18;
/// Ring 0 16-bit code, base 0, limit 64 KiB.
pub const CODE16: u16 = 0x20;
/// Ring 0 16-bit data, base 0, limit 64 KiB.
pub const DATA16: u16 = 0x28;
/// Ring 3 flat 32-bit code.
pub const USER_CODE32: u16 = 0x30 | 3;
/// Ring 3 flat data.
pub const USER_DATA: u16 = 0x38 | 3;
/// Ring 3 64-bit code.
pub const USER_CODE64: u16 = 0x40 | 3;
/// The task-state segment (two slots).
pub const TSS: u16 = 0x48;
/// Four slots that cases fill as they like.
pub const SCRATCH: u16 = 0x58;

/// Where the standard GDT begins its life; `set_descriptor` changes the copy in use.
const GDT_INIT: [u64; 16] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_9b00_0000_ffff,
    0x0000_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
];

#[repr(C, align(4096))]
struct Gdt([u64; 16]);
static GDT: Racy<Gdt> = Racy::new(Gdt(GDT_INIT));

/// 64-bit TSS. AMD APM vol. 2, 12.2.5. Words of 32 bits since its fields are not 8-aligned.
#[repr(C, align(16))]
struct Tss([u32; 26]);
const _: () = assert!(core::mem::size_of::<Tss>() == 112);
static TSS_DATA: Racy<Tss> = Racy::new(Tss([0; 26]));

const STACK_SIZE: usize = 16 << 10;
#[repr(C, align(16))]
struct Stacks([[u8; STACK_SIZE]; 4]);
static STACKS: Racy<Stacks> = Racy::new(Stacks([[0; STACK_SIZE]; 4]));

static CR0: AtomicU64 = AtomicU64::new(0);
static CR3: AtomicU64 = AtomicU64::new(0);
static CR4: AtomicU64 = AtomicU64::new(0);
static EFER: AtomicU64 = AtomicU64::new(0);
static PAT: AtomicU64 = AtomicU64::new(0);

/// Top of TSS stack `index`: 0 is RSP0, 1 to 3 are IST1 to IST3.
pub fn stack_top(index: usize) -> u64 {
    STACKS.addr() + ((index + 1) * STACK_SIZE) as u64
}

/// Sets RSP0 (`index` 0) or an IST pointer (1 to 7) in the TSS.
pub fn set_tss_stack(index: usize, top: u64) {
    let word = if index == 0 { 1 } else { 7 + 2 * index };
    // SAFETY: the TSS is plain memory that no reference points to.
    unsafe {
        (*TSS_DATA.get()).0[word] = top as u32;
        (*TSS_DATA.get()).0[word + 1] = (top >> 32) as u32;
    }
}

/// Replaces descriptor `selector` of the GDT.
pub fn set_descriptor(selector: u16, value: u64) {
    poke(GDT.addr() + u64::from(selector & !7), value);
}

/// Reads descriptor `selector` of the GDT.
pub fn descriptor(selector: u16) -> u64 {
    peek(GDT.addr() + u64::from(selector & !7))
}

/// Address of the GDT.
pub fn gdt() -> u64 {
    GDT.addr()
}

fn load_segments() {
    let pointer = pseudo_descriptor(GDT.addr(), 16 * 8 - 1);
    exec!("lgdt [{}]", in(reg) &pointer, options(nostack));
    exec!(
        "push {code}", "lea {tmp}, [rip + 2f]", "push {tmp}", "retfq", "2:",
        "mov ds, {data:e}", "mov es, {data:e}", "mov ss, {data:e}",
        code = in(reg) u64::from(CODE64), tmp = out(reg) _, data = in(reg) u64::from(DATA)
    );
}

/// Fills and loads the TSS, also after something else was in TR.
pub fn load_tss() {
    for index in 0..4 {
        set_tss_stack(index, stack_top(index));
    }
    // SAFETY: as above. No I/O permission map: its base is at the limit. AMD APM vol. 2, 12.2.5.
    unsafe { (*TSS_DATA.get()).0[25] = 104 << 16 };
    let base = TSS_DATA.addr();
    let limit = core::mem::size_of::<Tss>() as u64 - 9;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    set_descriptor(TSS, low);
    set_descriptor(TSS + 8, base >> 32);
    exec!("ltr {0:x}", in(reg) u32::from(TSS), options(nostack));
}

/// Loads the descriptor tables and remembers the control registers as the baseline.
pub fn init() {
    load_segments();
    load_tss();
    CR0.store(cr0(), Relaxed);
    CR3.store(cr3(), Relaxed);
    CR4.store(cr4(), Relaxed);
    EFER.store(rdmsr(MSR_EFER), Relaxed);
    PAT.store(try_rdmsr(MSR_PAT).unwrap_or(0), Relaxed);
    pic::init();
    lapic::init();
    baseline();
}

/// CR0 as cases start with it.
pub fn base_cr0() -> u64 {
    CR0.load(Relaxed)
}

/// CR3 as cases start with it.
pub fn base_cr3() -> u64 {
    CR3.load(Relaxed)
}

/// CR4 as cases start with it.
pub fn base_cr4() -> u64 {
    CR4.load(Relaxed)
}

/// Puts everything back that a case may have changed.
pub fn baseline() {
    cli();
    exec!("cld");
    // Restored in an order in which no step is invalid, whatever the case left behind.
    if cr4() != base_cr4() {
        set_cr4(base_cr4());
    }
    if cr0() != base_cr0() {
        set_cr0(base_cr0());
    }
    set_cr3(base_cr3());
    if rdmsr(MSR_EFER) != EFER.load(Relaxed) {
        wrmsr(MSR_EFER, EFER.load(Relaxed));
    }
    set_cr8(0);
    set_rflags(2);
    trap::reset();
    load_segments();
    for index in 0..4 {
        set_tss_stack(index, stack_top(index));
    }
    // A case may end with debug registers armed.
    let _ = catch(|| {
        set_dr7(0x400);
        set_dr6(0xffff_0ff0);
    });
    pic::mask_all();
    ioapic::mask_all();
    lapic::quiet();
    trap::reset();
}

/// Maximum physical address width. AMD APM vol. 3, E.4.7.
pub fn physical_bits() -> u32 {
    cpu::cpuid(0x8000_0008, 0).eax & 0xff
}
