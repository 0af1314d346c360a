//! IN and OUT.
use guests::dev::{fw_cfg, pic, pit, rtc};
use guests::exec;
use guests::prelude::*;
use guests::report::case;

/// Ports where neither QEMU's q35 nor Umbra has anything.
const UNCLAIMED: [u16; 4] = [0x1e8, 0x2e8, 0x9000, 0xfffc];
/// The UART's scratch register, a byte of memory behind a port.
const SCRATCH: u16 = 0x3ff;
/// PCI configuration mechanism 1.
const CF8: u16 = 0xcf8;
const CFC: u16 = 0xcfc;

pub(crate) fn run() {
    byte_ports();
    wide_ports();
    registers();
    pci();
}

fn byte_ports() {
    case("port.scratch_register", |t| {
        for value in [0u8, 0x55, 0xaa, 0xff] {
            outb(SCRATCH, value);
            t.eq("scratch register", inb(SCRATCH), value);
        }
    });
    case("port.all_values", |t| {
        for value in 0..=255u8 {
            outb(SCRATCH, value);
            let got = inb(SCRATCH);
            t.check(got == value, format_args!("{value:#x}, got {got:#x}"));
        }
    });
    case("port.immediate_form", |t| {
        let value: u8;
        exec!("mov al, 0x5a", "out 0x21, al", "xor eax, eax", "in al, 0x21", out("al") value);
        t.eq("mask of the PIC", value, 0x5au8);
    });
    case("port.pic_masks", |t| {
        pic::set_mask(0xa55a);
        t.eq("masks", pic::mask(), 0xa55au16);
        t.eq("master", inb(0x21), 0x5au8);
        t.eq("slave", inb(0xa1), 0xa5u8);
    });
    case("port.cmos_index_and_data", |t| {
        let old = rtc::read(0x70);
        for value in [0u8, 0x3c, 0xff] {
            rtc::write(0x70, value);
            t.eq("CMOS byte 70h", rtc::read(0x70), value);
        }
        rtc::write(0x70, old);
    });
    case("port.pit_latch", |t| {
        if t.skip_on_bare_tcg("the gate does not stop mode 0") {
            return;
        }
        // Mode 0 with the gate of channel 2 closed: the count stands still at what was loaded.
        pit::gate2(false);
        pit::program(2, 0, 0x1234);
        delay(1_000_000);
        let value = pit::read(2);
        t.within("count of the stopped channel 2", value.into(), 0x1232, 0x1234);
    });
    case("port.unclaimed_bytes", |t| {
        for port in UNCLAIMED {
            outb(port, 0);
            t.eq("an unclaimed port", inb(port), 0xffu8);
        }
    });
    case("port.post_code", |t| {
        (0..=255).for_each(|value| outb(0x80, value));
        t.yes("port 80h takes anything", true);
    });
}

fn wide_ports() {
    case("port.unclaimed_words", |t| {
        for port in UNCLAIMED {
            outw(port, 0);
            t.eq("an unclaimed port", inw(port), 0xffffu16);
        }
    });
    case("port.unclaimed_dwords", |t| {
        for port in UNCLAIMED {
            outl(port, 0);
            t.eq("an unclaimed port", inl(port), 0xffff_ffffu32);
        }
    });
    case("port.last_port", |t| {
        t.eq("port FFFFh", inb(0xffff), 0xffu8);
    });
    case("port.fw_cfg_selector_word", |t| {
        if !fw_cfg::present() {
            return t.skip("no fw_cfg");
        }
        outw(fw_cfg::PORT, fw_cfg::SIGNATURE);
        t.eq("the first byte", inb(fw_cfg::PORT + 1), b'Q');
    });
    case("port.pm_timer_dword", |t| {
        let first = guests::dev::acpi_timer::read();
        delay(10_000_000);
        let second = guests::dev::acpi_timer::read();
        t.yes("a timer that advances", guests::dev::acpi_timer::elapsed(first, second) > 0);
    });
}

fn registers() {
    case("port.in_al_keeps_the_rest", |t| {
        outb(SCRATCH, 0x77);
        let value: u64;
        exec!("in al, dx", in("dx") SCRATCH, inout("rax") 0x1122_3344_5566_7788u64 => value);
        t.eq("RAX", value, 0x1122_3344_5566_7777u64);
    });
    case("port.in_ax_keeps_the_rest", |t| {
        let value: u64;
        exec!("in ax, dx", in("dx") UNCLAIMED[0], inout("rax") 0x1122_3344_5566_7788u64 => value);
        t.eq("RAX", value, 0x1122_3344_5566_ffffu64);
    });
    case("port.in_eax_zero_extends", |t| {
        let value: u64;
        exec!("in eax, dx", in("dx") UNCLAIMED[0], inout("rax") 0x1122_3344_5566_7788u64 => value);
        t.eq("RAX", value, 0xffff_ffffu64);
    });
    case("port.rex_w_changes_nothing", |t| {
        let value: u64;
        exec!(".byte 0x48, 0xed", in("dx") UNCLAIMED[0], inout("rax") !0u64 => value);
        t.eq("RAX", value, 0xffff_ffffu64);
    });
    case("port.high_bits_of_dx_ignored", |t| {
        outb(SCRATCH, 0x42);
        let value: u8;
        exec!("in al, dx", in("rdx") 0xdead_beef_0000_0000u64 | u64::from(SCRATCH), out("al") value);
        t.eq("scratch register", value, 0x42u8);
    });
    case("port.flags_unchanged", |t| {
        let (before, after): (u64, u64);
        exec!("stc", "pushfq", "in al, 0x21", "out 0x80, al", "pushfq", "pop {a}", "pop {b}",
            a = out(reg) after, b = out(reg) before, out("rax") _);
        t.eq("RFLAGS", after, before);
    });
    case("port.prefixes", |t| {
        outb(SCRATCH, 0x42);
        let value: u8;
        // Segment override, REP without a string, operand size on a byte form: all without effect.
        exec!(".byte 0x2e, 0xec", in("dx") SCRATCH, out("al") value);
        t.eq("with CS:", value, 0x42u8);
        let value: u8;
        exec!(".byte 0xf3, 0xec", in("dx") SCRATCH, out("al") value);
        t.eq("with REP", value, 0x42u8);
        let value: u8;
        exec!(".byte 0x66, 0xec", in("dx") SCRATCH, out("al") value);
        t.eq("with an operand size", value, 0x42u8);
    });
}

fn pci() {
    let bridge = 0x8000_0000u32;
    case("pci.cf8_reads_back", |t| {
        for value in [bridge, 0x8000_f8fc, 0] {
            outl(CF8, value);
            t.eq("CONFIG_ADDRESS", inl(CF8), value);
        }
    });
    case("pci.host_bridge_ids", |t| {
        outl(CF8, bridge);
        let id = inl(CFC);
        t.yes("a host bridge at 0:0.0", id != !0 && id != 0);
        t.eq("vendor by word", inw(CFC), id & 0xffff);
        t.eq("device by word", inw(CFC + 2), id >> 16);
        for byte in 0..4u16 {
            t.eq("a byte of it", inb(CFC + byte), id >> (8 * byte) & 0xff);
        }
    });
    case("pci.class_is_host_bridge", |t| {
        outl(CF8, bridge | 8);
        t.eq("class and subclass", inl(CFC) >> 16, 0x600u32);
    });
    case("pci.absent_device", |t| {
        outl(CF8, bridge | 9 << 11);
        t.eq("identification by dword", inl(CFC), !0u32);
        t.eq("identification by word", inw(CFC), 0xffffu16);
        t.eq("identification by byte", inb(CFC + 3), 0xffu8);
        outl(CFC, 0);
    });
    case("pci.disabled", |t| {
        // Without the enable bit the data port reads ones. PCI 3.0, 3.2.2.3.2.
        outl(CF8, 0);
        t.eq("CONFIG_DATA", inl(CFC), !0u32);
    });
    case("pci.interrupt_line_holds_bytes", |t| {
        outl(CF8, bridge | 0x3c);
        let old = inb(CFC);
        for value in [0u8, 0x5a, 0xff] {
            outb(CFC, value);
            t.eq("interrupt line", inb(CFC), value);
            t.eq("interrupt line in the dword", inl(CFC) & 0xff, value);
        }
        outb(CFC, old);
    });
    case("pci.all_functions_of_bus_0", |t| {
        let mut found = 0u32;
        for slot in 0..32 {
            outl(CF8, bridge | slot << 11);
            found += u32::from(inl(CFC) != !0);
        }
        t.within("devices", found.into(), 1, 32);
    });
    case("pci.ecam_agrees_with_ports", |t| {
        let Some(ecam) = guests::dev::acpi::ecam() else { return t.skip("no MCFG") };
        // Registers that do not change by themselves.
        for register in [0u32, 8, 0x0c, 0x2c, 0x34, 0x3c] {
            outl(CF8, bridge | register);
            t.eq("a register of the host bridge", peek::<u32>(ecam + u64::from(register)), inl(CFC));
        }
        t.eq("an absent device", peek::<u32>(ecam + (9 << 15)), !0u32);
    });
}
