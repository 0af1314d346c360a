//! What the loader and fw_cfg say about the machine.
//!
//! Scenarios pass the words `cmdline-test` and `key=value` on the command line, and modules whose content is the
//! repeated text `umbra module`, possibly cut.
#![no_std]
#![no_main]
use guests::dev::fw_cfg;
use guests::entry::MULTIBOOT_MAGIC;
use guests::main;
use guests::multiboot::boot;
use guests::prelude::*;
use guests::report::{case, Case};

main!(run);

fn run() {
    multiboot_cases();
    memory_map();
    modules();
    fw_cfg_cases();
}

fn multiboot_cases() {
    case("multiboot.magic", |t| t.eq("EAX at entry", boot().magic, MULTIBOOT_MAGIC));
    case("multiboot.flags", |t| {
        // Memory sizes and memory map. Multiboot specification 0.6.96, 3.3.
        t.masked("flags", boot().flags, 0x41u32, 0x41);
    });
    case("multiboot.command_line", |t| {
        t.masked("flag 2", boot().flags, 4u32, 4);
        // QEMU puts the file's name first; the words are what matters.
        if boot().word("cmdline-test") {
            t.yes("key=value with value `value`", boot().value("key") == Some("value"));
        } else {
            t.yes("a command line without the test's words", boot().value("key").is_none());
        }
    });
    case("multiboot.lower_and_upper_memory", |t| {
        let (lower, upper) = boot().mem;
        t.within("KiB below 1 MiB", lower.into(), 512, 640);
        let map: u64 = boot()
            .ranges()
            .iter()
            .filter(|range| range.kind == 1 && range.start <= 1 << 20 && range.start + range.len > 1 << 20)
            .map(|range| range.start + range.len - (1 << 20))
            .sum();
        // The map may lose a few pages at the top to firmware.
        t.within("KiB above 1 MiB", upper.into(), (map >> 10).saturating_sub(1024), (map >> 10) + 1024);
    });
}

fn memory_map() {
    case("memory_map.has_ram", |t| {
        let ranges = boot().ranges();
        t.yes("at least two RAM ranges", ranges.iter().filter(|range| range.kind == 1).count() >= 2);
        t.yes("RAM at address 0", ranges.iter().any(|range| range.kind == 1 && range.start == 0));
        t.yes("RAM at 1 MiB", ranges.iter().any(|range| range.kind == 1 && range.start == 1 << 20));
    });
    case("memory_map.sorted_and_disjoint", |t| {
        for pair in boot().ranges().windows(2) {
            t.check(
                pair[0].start + pair[0].len <= pair[1].start,
                format_args!("ranges in order without overlap, got {:x?} then {:x?}", pair[0], pair[1]),
            );
        }
        t.yes("ranges with a length", boot().ranges().iter().all(|range| range.len > 0));
        t.yes(
            "no range past the end of 64 bits",
            boot().ranges().iter().all(|range| range.start.checked_add(range.len).is_some()),
        );
    });
    case("memory_map.no_ram_in_the_video_window", |t| {
        let hole = |start: u64, end: u64| {
            !boot()
                .ranges()
                .iter()
                .any(|range| range.kind == 1 && range.start < end && range.start + range.len > start)
        };
        t.yes("no RAM from A0000 to FFFFF", hole(0xa_0000, 0x10_0000));
        t.yes("no RAM where the APICs are", hole(0xfec0_0000, 0xfef0_0000));
    });
    case("memory_map.covers_the_image", |t| {
        let here = run as *const () as u64;
        t.yes(
            "RAM under the program",
            boot()
                .ranges()
                .iter()
                .any(|range| range.kind == 1 && range.start <= here && here < range.start + range.len),
        );
        let info = u64::from(boot().info);
        t.yes(
            "RAM under the information block",
            boot()
                .ranges()
                .iter()
                .any(|range| range.kind == 1 && range.start <= info && info < range.start + range.len),
        );
    });
    case("memory_map.agrees_with_fw_cfg", |t| {
        if !fw_cfg::present() {
            return t.skip("no fw_cfg");
        }
        let map: u64 = boot().ranges().iter().filter(|range| range.kind == 1).map(|range| range.len).sum();
        // The map leaves out the video window, firmware and tables: less than 2 MiB.
        t.within("RAM of fw_cfg", fw_cfg::ram_size(), map, map + (2 << 20));
    });
}

fn modules() {
    case("modules.plausible", |t| {
        if boot().modules().is_empty() {
            return t.skip("none given");
        }
        t.masked("flag 3", boot().flags, 8u32, 8);
        for (index, module) in boot().modules().iter().enumerate() {
            t.eq("start, a page boundary", module.start & 0xfff, 0u64);
            t.yes("a length", module.end > module.start);
            for other in &boot().modules()[..index] {
                t.yes("modules that do not overlap", other.end <= module.start || module.end <= other.start);
            }
            t.yes("a place outside the program", {
                let here = run as *const () as u64;
                !(module.start..module.end).contains(&here)
            });
        }
    });
    case("modules.content", |t| {
        if boot().modules().is_empty() {
            return t.skip("none given");
        }
        for module in boot().modules() {
            let text = b"umbra module";
            for at in module.start..module.end {
                let want = text[(at - module.start) as usize % text.len()];
                let got: u8 = peek(at);
                if got != want {
                    return t.check(false, format_args!("byte {want:#x} at {at:#x}, got {got:#x}"));
                }
            }
            t.yes("contents read to the end", true);
        }
    });
    case("modules.strings", |t| {
        if boot().modules().is_empty() {
            return t.skip("none given");
        }
        t.yes("a string for each module", boot().modules().iter().all(|module| !module.line().is_empty()));
    });
}

fn fw_cfg_cases() {
    let with = |name: &str, run: fn(&mut Case)| {
        case(name, |t| if fw_cfg::present() { run(t) } else { t.skip("no fw_cfg") });
    };
    case("fw_cfg.signature", |t| {
        let got: [u8; 4] = fw_cfg::read(fw_cfg::SIGNATURE);
        t.check(&got == b"QEMU", format_args!("`QEMU`, got {got:?}"));
    });
    with("fw_cfg.id", |t| {
        t.masked("the traditional interface", u32::from_le_bytes(fw_cfg::read(fw_cfg::ID)), 1u32, 1);
    });
    with("fw_cfg.reselecting_rewinds", |t| {
        for _ in 0..10 {
            let got: [u8; 4] = fw_cfg::read(fw_cfg::SIGNATURE);
            t.check(&got == b"QEMU", format_args!("`QEMU`, got {got:?}"));
        }
    });
    with("fw_cfg.zeros_behind_the_end", |t| {
        let got: [u8; 12] = fw_cfg::read(fw_cfg::SIGNATURE);
        t.check(got[4..] == [0; 8], format_args!("zeros after four bytes, got {got:?}"));
    });
    with("fw_cfg.unknown_item", |t| {
        let got: [u8; 8] = fw_cfg::read(0x3fff);
        t.check(got == [0; 8], format_args!("zeros, got {got:?}"));
    });
    with("fw_cfg.ram_size", |t| {
        t.within("MiB of RAM", fw_cfg::ram_size() >> 20, 1, 1 << 20);
        t.eq("RAM beyond whole 4 KiB pages", fw_cfg::ram_size() % 4096, 0u64);
    });
    with("fw_cfg.cpu_count", |t| t.within("CPUs", fw_cfg::cpus().into(), 1, 255));
    with("fw_cfg.directory", |t| {
        let mut bad = 0u32;
        let mut last = [0u8; 56];
        let mut sorted = true;
        let count = fw_cfg::files(|file| {
            let named = file.name[0] != 0 && file.name[55] == 0;
            bad += u32::from(!named || file.select < 0x20);
            sorted &= last <= file.name;
            last = file.name;
        });
        t.within("files", count.into(), 0, 1000);
        t.eq("entries with a bad name or selector", bad, 0u32);
        t.yes("names in order", sorted);
    });
    with("fw_cfg.byte_reads_only_advance_by_one", |t| {
        outw(fw_cfg::PORT, fw_cfg::SIGNATURE);
        let bytes: [u8; 4] = core::array::from_fn(|_| {
            cpuid(0, 0);
            inb(fw_cfg::PORT + 1)
        });
        t.check(&bytes == b"QEMU", format_args!("`QEMU`, got {bytes:?}"));
    });
}
