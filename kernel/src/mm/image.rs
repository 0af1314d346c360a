//! Where the linker put the parts of the image; link addresses are physical addresses.
// Symbols of the linker script.
#![allow(unsafe_code)]

use super::ranges::Range;

extern "C" {
    static __text_start: u8;
    static __text_end: u8;
    static __rodata_start: u8;
    static __rodata_end: u8;
    static __data_start: u8;
    static __data_end: u8;
    static __bss_start: u8;
    static __bss_end: u8;
    static __boot_stack_guard: u8;
    static __boot_stack_bottom: u8;
    static __boot_stack_top: u8;
}

macro_rules! range {
    ($name:ident, $start:ident, $end:ident, $what:literal) => {
        #[doc = $what]
        pub(super) fn $name() -> Range {
            Range::new(&raw const $start as u64, &raw const $end as u64)
        }
    };
}

range!(text, __text_start, __text_end, "Code.");
range!(rodata, __rodata_start, __rodata_end, "Constants.");
range!(data, __data_start, __data_end, "Initialised variables.");
range!(
    bss_below_guard,
    __bss_start,
    __boot_stack_guard,
    "Zeroed variables, up to the boot stack's guard page."
);
range!(boot_stack, __boot_stack_bottom, __boot_stack_top, "The boot stack; the bss ends with it.");
range!(boot_stack_guard, __boot_stack_guard, __boot_stack_bottom, "The page below the boot stack.");
range!(above_boot_stack, __boot_stack_top, __bss_end, "What follows the boot stack, if anything.");

/// Whether `addr` lies in Umbra's code.
pub fn is_text(addr: u64) -> bool {
    text().contains(Range::from_len(addr, 1))
}
