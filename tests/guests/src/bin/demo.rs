//! The built-in demo guest: says what machine it sees and answers a few commands on COM1.
#![no_std]
#![no_main]
use guests::cpu::{cpuid, has, outb, outw};
use guests::dev::fw_cfg;
use guests::multiboot::boot;
use guests::{main, platform, print, println, serial};

main!(run);

/// ACPI PM1a control block and its sleep-enable bit. ACPI 6.5, 4.8.3.2.1.
const PM1A_CNT: u16 = 0x604;
const SLP_EN: u16 = 1 << 13;
/// SLP_TYP of S5: 5 on Umbra, 0 on QEMU's q35.
const S5: [u16; 2] = [5, 0];
/// Reset control register; 6 is a hard reset.
const RESET: u16 = 0xcf9;

fn run() {
    println!();
    println!("Hello from a guest in long mode.");
    facts();
    memory();
    println!("Type `help` for the commands.");
    let mut line = [0; 64];
    loop {
        print!("demo> ");
        match read_line(&mut line) {
            "" => {}
            "help" => println!("help  cpuid  mem  poweroff  reboot"),
            "cpuid" => leaves(),
            "mem" => memory(),
            "poweroff" => poweroff(),
            "reboot" => reboot(),
            other => println!("`{other}` is no command; `help` lists them"),
        }
    }
}

/// Echoes and edits one line; CR, LF or both end it.
fn read_line(buffer: &mut [u8; 64]) -> &str {
    let mut len = 0;
    loop {
        match serial::get() {
            Some(b'\r' | b'\n') => break,
            Some(8 | 127) if len > 0 => {
                len -= 1;
                print!("\x08 \x08");
            }
            Some(byte @ 32..=126) if len < buffer.len() => {
                buffer[len] = byte;
                len += 1;
                serial::put(byte);
            }
            _ => guests::exec!("pause"),
        }
    }
    println!();
    core::str::from_utf8(&buffer[..len]).unwrap_or("").trim()
}

fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    core::str::from_utf8(&bytes[..end]).unwrap_or("?").trim()
}

fn words(leaf: u32, order: [usize; 4]) -> [u8; 16] {
    let got = cpuid(leaf, 0);
    let registers = [got.eax, got.ebx, got.ecx, got.edx];
    core::array::from_fn(|index| registers[order[index / 4]].to_le_bytes()[index % 4])
}

fn facts() {
    let vendor = words(0, [1, 3, 2, 0]);
    print!("  processor   {}", text(&vendor[..12]));
    if cpuid(0x8000_0000, 0).eax >= 0x8000_0004 {
        print!(", ");
        for leaf in 0x8000_0002..=0x8000_0004u32 {
            print!("{}", text(&words(leaf, [0, 1, 2, 3])));
        }
    }
    println!();
    let signature = platform::signature();
    match text(&signature) {
        "" => println!("  hypervisor  none that shows itself"),
        name => println!("  hypervisor  {name}"),
    }
    if fw_cfg::present() {
        println!("  CPUs        {}", fw_cfg::cpus());
        println!("  RAM         {} MiB", fw_cfg::ram_size() >> 20);
    }
    println!("  command     {}", boot().command_line());
}

fn leaves() {
    for base in [0, 0x4000_0000, 0x8000_0000u32] {
        let max = cpuid(base, 0).eax;
        if !(base..base + 0x100).contains(&max) {
            continue;
        }
        for leaf in base..=max {
            let got = cpuid(leaf, 0);
            println!("  {leaf:08x}: {:08x} {:08x} {:08x} {:08x}", got.eax, got.ebx, got.ecx, got.edx);
        }
    }
    println!(
        "  long mode {}, 1G pages {}",
        has(0x8000_0001, 0, |r| r.edx, 29),
        has(0x8000_0001, 0, |r| r.edx, 26)
    );
}

fn memory() {
    for range in boot().ranges() {
        let kind = if range.kind == 1 { "RAM" } else { "reserved" };
        println!(
            "  {:#013x} to {:#013x}  {:>8} KiB  {kind}",
            range.start,
            range.start + range.len,
            range.len >> 10
        );
    }
}

fn poweroff() {
    println!("Powering off.");
    for typ in S5 {
        outw(PM1A_CNT, typ << 10 | SLP_EN);
    }
    println!("The machine did not power off.");
}

fn reboot() {
    println!("Rebooting.");
    outb(RESET, 2);
    outb(RESET, 6);
    println!("The machine did not reset.");
}
