//! Machines whose console is not COM1 alone: a screen and a keyboard, with and without a serial port.

use anyhow::{ensure, Result};
use xtask::emulator::{Boot, Hardware, Machine};

use super::boot::demo_bundle;
use crate::cases::Cases;
use crate::context::Ctx;
use crate::scenario::{Need, Scenario};
use crate::screen::Screen;

/// A machine that is seen and typed at by its screen and keyboard alone.
const NO_COM1: Hardware =
    Hardware { board: "q35", com1: false, screen: true, absent_cpus: 0, grub_command: "" };

pub(super) fn all() -> Vec<Scenario> {
    let pixels = |mode| Hardware { grub_command: mode, ..NO_COM1 };
    let mut all = vec![
        Scenario::new("screen_bios", |ctx| talk(ctx, Boot::Iso)).needs(&[Need::Grub]),
        Scenario::new("screen_uefi", |ctx| talk(ctx, Boot::Uefi)).needs(&[Need::Grub, Need::Uefi]),
    ];
    for (name, mode) in [
        ("screen_15_bits", "set gfxpayload=800x600x15"),
        ("screen_16_bits", "set gfxpayload=800x600x16"),
        ("screen_24_bits", "set gfxpayload=800x600x24"),
    ] {
        all.push(Scenario::new(name, move |ctx| depth(ctx, pixels(mode))).needs(&[Need::Grub]));
    }
    all.into_iter().map(|scenario| scenario.limit(180)).collect()
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
    screen.type_line("poweroff")?;
    // It goes off, and with it the monitor.
    while screen.is_on() {
        ensure!(!ctx.remaining().is_zero(), "the machine did not switch itself off");
    }
    Ok(Cases::passed())
}

/// The log can be read in other depths than the usual 32 bits.
fn depth(ctx: &Ctx, hardware: Hardware) -> Result<Cases> {
    let machine = Machine { boot: Boot::Iso, hardware, ..ctx.machine() };
    let mut screen = Screen::boot(ctx, &machine, &demo_bundle(ctx, "")?)?;
    screen.expect("^umbra: running$")?;
    screen.expect("^demo> ")?;
    Ok(Cases::passed())
}
