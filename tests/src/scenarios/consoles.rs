//! Machines whose console is not COM1 alone: a screen and a keyboard, with and without a serial port.

use anyhow::{ensure, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{Boot, Hardware, Machine};
use xtask::size::Size;

use super::boot::{demo_bundle, demo_log};
use crate::cases::Cases;
use crate::context::Ctx;
use crate::header::{self, Wanted};
use crate::scenario::{Need, Scenario};
use crate::screen::Screen;

/// A machine that is seen and typed at by its screen and keyboard alone.
const NO_COM1: Hardware =
    Hardware { board: "q35", com1: false, screen: true, absent_cpus: 0, grub_command: "" };

pub(super) fn all() -> Vec<Scenario> {
    let all = vec![
        Scenario::new("screen_bios", |ctx| talk(ctx, Boot::Iso)),
        Scenario::new("screen_uefi", |ctx| talk(ctx, Boot::Uefi)).needs(&[Need::Uefi]),
        Scenario::new("screen_15_bits", |ctx| depth(ctx, 15)),
        Scenario::new("screen_16_bits", |ctx| depth(ctx, 16)),
        Scenario::new("screen_24_bits", |ctx| depth(ctx, 24)),
        Scenario::new("screen_text_mode", text_mode),
        Scenario::new("screen_shows_a_refusal", refusal),
        Scenario::new("screen_and_com1", both),
        Scenario::new("screen_not_wanted", not_wanted),
        Scenario::new("console_elsewhere", elsewhere),
    ];
    all.into_iter().map(|scenario| scenario.needs(&[Need::Grub]).limit(180)).collect()
}

/// Reads the boot log on the screen, talks to the demo guest by the keyboard and has it switch off.
fn talk(ctx: &Ctx, boot: Boot) -> Result<Cases> {
    let machine = Machine { boot, hardware: NO_COM1, ..ctx.machine() };
    let mut screen = Screen::boot(ctx, &machine, &demo_bundle(ctx, "")?)?;
    screen.expect("^demo> ")?;
    screen.type_line("hello")?;
    screen.expect("^demo> hello")?;
    screen.type_line("help")?;
    screen.expect("poweroff")?;
    screen.key("ctrl-a")?;
    screen.key("r")?;
    screen.expect("^umbra: report: console: com1=none .* mode=32-bit columns=146 rows=48 keyboard=yes$")?;
    screen.type_line("poweroff")?;
    // It goes off, and with it the monitor.
    while screen.is_on() {
        ensure!(!ctx.remaining().is_zero(), "the machine did not switch itself off");
    }
    Ok(Cases::passed())
}

/// The log can be read in other depths than the usual 32 bits.
fn depth(ctx: &Ctx, bits: u32) -> Result<Cases> {
    let umbra = header::patch(&ctx.images.umbra, ctx.dir.join("umbra"), Wanted::Depth(bits))?;
    let machine = Machine { boot: Boot::Iso, hardware: NO_COM1, umbra, ..ctx.machine() };
    let mut screen = Screen::boot(ctx, &machine, &demo_bundle(ctx, "")?)?;
    screen.expect("^umbra: running$")?;
    screen.expect("^demo> ")?;
    screen.expect(&format!("^umbra: report: console: .* mode={bits}-bit "))?;
    Ok(Cases::passed())
}

/// Without a framebuffer there is text mode.
fn text_mode(ctx: &Ctx) -> Result<Cases> {
    let umbra = header::patch(&ctx.images.umbra, ctx.dir.join("umbra"), Wanted::Text)?;
    let machine = Machine { boot: Boot::Iso, hardware: NO_COM1, umbra, ..ctx.machine() };
    let mut screen = Screen::boot(ctx, &machine, &demo_bundle(ctx, "")?)?.in_text_mode();
    screen.expect("^umbra: running$")?;
    screen.expect("^demo>")?;
    screen.type_line("hello")?;
    screen.expect("^demo> hello")?;
    Ok(Cases::passed())
}

/// What Umbra refuses before it has page tables and a heap of its own is on the screen, too.
fn refusal(ctx: &Ctx) -> Result<Cases> {
    let machine = Machine { boot: Boot::Iso, hardware: NO_COM1, memory: Size::mib(64), ..ctx.machine() };
    let mut screen = Screen::boot(ctx, &machine, &demo_bundle(ctx, "")?)?;
    screen.expect("^umbra: error: this machine has [0-9]+ MiB of usable memory; ")?;
    screen.expect("^umbra: end: status 65$")?;
    Ok(Cases::passed())
}

fn report_line(log: &str) -> &str {
    log.lines().find(|line| line.starts_with("umbra: report: console: ")).unwrap_or_default()
}

/// With both, both are used.
fn both(ctx: &Ctx) -> Result<Cases> {
    let hardware = Hardware { com1: true, ..NO_COM1 };
    let log = demo_log(ctx, &Machine { boot: Boot::Iso, hardware, ..ctx.machine() })?;
    let line = report_line(&log);
    ensure!(line.contains("com1=0x3f8 com2=none framebuffer=0x") && line.contains("keyboard=yes"), "{line}");
    Ok(Cases::passed())
}

/// The screen goes out of use when umbra.toml does not name it: the report on demand says so.
fn not_wanted(ctx: &Ctx) -> Result<Cases> {
    let hardware = Hardware { com1: true, ..NO_COM1 };
    let machine = Machine { boot: Boot::Iso, hardware, ..ctx.machine() };
    let mut vm = ctx.boot(&machine, &demo_bundle(ctx, "[umbra]\nconsole = [\"com1\"]")?)?;
    vm.expect("^demo> ")?;
    vm.type_text("\x01r")?;
    vm.expect("^umbra: report: begin: ")?;
    vm.expect("^umbra: report: console: com1=0x3f8 com2=none framebuffer=none mode=none .* keyboard=no$")?;
    vm.expect("^umbra: report: end: lines=[0-9]+$")?;
    vm.type_line("poweroff")?;
    vm.end_with(0)?;
    Ok(Cases::passed())
}

/// A console that does not exist leaves the one that does.
fn elsewhere(ctx: &Ctx) -> Result<Cases> {
    let config = "[umbra]\nconsole = [\"com2\", \"framebuffer\"]";
    let bundle: Bundle = demo_bundle(ctx, config)?;
    let mut vm = ctx.boot(&ctx.machine(), &bundle)?;
    vm.expect("^umbra: warning: none of the consoles that umbra.toml names exists")?;
    vm.expect("^demo> ")?;
    vm.type_line("poweroff")?;
    vm.end_with(0)?;
    Ok(Cases::passed())
}
