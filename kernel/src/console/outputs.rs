//! The console's devices: serial ports and a screen as the log's backend and the guests' terminal. Works before the heap,
//! and in panics and NMIs.
// Takes a lock away from a CPU that will never give it back, and believes what a framebuffer was mapped at.
#![allow(unsafe_code)]

use super::framebuffer::{self, Mapped};
use super::keyboard::Keyboard;
use super::keys::MAX_BYTES;
use super::lines::{Lines, Sink};
use super::screen::paint::Painter;
use super::screen::{Buffers, Screen};
use super::serial::{Serial, COM1, COM2, POLLS};
use super::{Devices, ScreenInfo};
use crate::cpu::tsc;
use crate::mm::ranges::Range;
use crate::sync::IrqMutex;
use arrayvec::ArrayVec;
use boot::config::Console;
use bootloader_api::BootInfo;
use core::fmt;
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::mutex::{SpinMutex, SpinMutexGuard};

/// Painting a screen anew takes at most one part in so many of the time.
const PAINT_SHARE: u64 = 16;

static CONSOLE: IrqMutex<Lines<Outputs>> = IrqMutex::new(Lines::new(Outputs::new()));
static BUFFERS: SpinMutex<Buffers> = SpinMutex::new(Buffers::new());

/// All devices, present or not.
struct Outputs {
    /// COM1, or in its place the port that the firmware names.
    com1: Serial,
    com2: Serial,
    screen: Option<Screen<Mapped>>,
    /// Where the screen's memory is.
    framebuffer: Range,
    keyboard: Option<Keyboard>,
    /// Rest of the sequence of a key.
    typed: ArrayVec<u8, MAX_BYTES>,
    /// When a screen that has moved is painted again.
    paint_at: u64,
    /// There is more than COM1.
    has_more: bool,
}

impl Outputs {
    const fn new() -> Self {
        Self {
            com1: Serial::absent(),
            com2: Serial::absent(),
            screen: None,
            framebuffer: Range::new(0, 0),
            keyboard: None,
            typed: ArrayVec::new_const(),
            paint_at: 0,
            has_more: false,
        }
    }

    /// Paints what was written. A screen that has moved is painted whole, which takes a while: only if that is urgent, or
    /// if the last time is long enough ago; else when someone comes by later.
    fn paint(&mut self, urgent: bool) {
        let Some(screen) = &mut self.screen else { return };
        if !screen.has_moved() {
            screen.paint();
            Mapped::settle();
            return;
        }
        let start = tsc::read();
        if urgent || start >= self.paint_at {
            screen.paint();
            Mapped::settle();
            let end = tsc::read();
            self.paint_at = end.saturating_add(end.saturating_sub(start).saturating_mul(PAINT_SHARE));
        }
    }
}

impl Outputs {
    /// A byte from elsewhere than COM1.
    #[cold]
    fn read_more(&mut self) -> Option<u8> {
        self.paint(false);
        let byte = self.com2.read();
        if byte.is_some() {
            return byte;
        }
        if self.typed.is_empty() {
            self.typed = self.keyboard.as_mut()?.read();
        }
        self.typed.pop_at(0)
    }

    fn set_has_more(&mut self) {
        self.has_more = self.screen.is_some() || self.com2.base().is_some();
    }
}

impl Sink for Outputs {
    fn put(&mut self, bytes: &[u8]) {
        self.com1.put(bytes);
        self.com2.put(bytes);
        if let Some(screen) = &mut self.screen {
            screen.write(bytes);
        }
    }
}

/// Initialises COM1, if there is one, and the loader's framebuffer, and makes them the log. Once, on the boot CPU.
pub fn init(boot_info: &BootInfo) {
    let found = framebuffer::find(boot_info);
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    outputs.com1 = Serial::open(COM1);
    if let Some(Ok((layout, range))) = found {
        let buffers = SpinMutexGuard::leak(BUFFERS.lock());
        let mut screen = Screen::new(Painter::new(layout), buffers);
        screen.set_memory(Mapped::by_identity(range));
        outputs.screen = Some(screen);
        outputs.framebuffer = range;
        outputs.set_has_more();
    }
    drop(console);
    // Fails only when there is a logger, which would be this one.
    let _ = log::set_logger(&Backend);
    log::set_max_level(LevelFilter::Info);
    if let Some(Err(unfit)) = found {
        log::warn!("the loader's framebuffer is not used, for {unfit}");
    }
}

/// Runs `change`, which replaces the page tables, while the screen's memory is left alone. It is told where that memory
/// is (an empty range if there is no screen) and returns where it is mapped then, or nothing where it is not; an error
/// means that all is as it was.
pub fn while_remapping<E>(change: impl FnOnce(Range) -> Result<Option<*mut u8>, E>) -> Result<(), E> {
    let range = CONSOLE.lock().sink().framebuffer;
    let set = |memory| {
        let mut console = CONSOLE.lock();
        if let Some(screen) = &mut console.sink().screen {
            screen.set_memory(memory);
        }
    };
    set(None);
    let changed = change(range);
    match changed {
        // SAFETY: the page tables map the whole range there, for good.
        Ok(at) => set(at.map(|at| unsafe { Mapped::at(at, range.len() as usize) })),
        Err(_) => set(Mapped::by_identity(range)),
    }
    CONSOLE.lock().sink().paint(true);
    changed.map(|_| ())
}

/// Takes the serial port at `base` in COM1's place, if COM1 is absent.
pub fn add_serial(base: u16) {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    if outputs.com1.base().is_none() {
        outputs.com1 = Serial::open(base);
    }
}

/// Takes the keyboard over, if there is one and a screen beside which it makes sense.
pub fn add_keyboard() {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    if outputs.screen.is_some() {
        outputs.keyboard = Keyboard::open();
    }
}

/// Goes on with those of the `wanted` outputs that exist. If none does, with what there is, and returns false.
pub fn choose(wanted: &[Console]) -> bool {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    let wants = |output| wanted.contains(&output);
    let com2 = if wants(Console::Com2) { Serial::open(COM2) } else { Serial::absent() };
    let com1_left = wants(Console::Com1) && outputs.com1.base().is_some();
    let screen_left = wants(Console::Framebuffer) && outputs.screen.is_some();
    if !com1_left && !screen_left && com2.base().is_none() {
        return false;
    }
    outputs.com2 = com2;
    if !com1_left {
        outputs.com1.flush();
        outputs.com1 = Serial::absent();
    }
    if !screen_left {
        (outputs.screen, outputs.keyboard) = (None, None);
    }
    outputs.set_has_more();
    true
}

/// What the console consists of now.
pub fn devices() -> Devices {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    Devices {
        com1: outputs.com1.base(),
        com2: outputs.com2.base(),
        screen: outputs.screen.as_ref().map(|screen| ScreenInfo {
            address: outputs.framebuffer.start,
            mode: screen.layout().name(),
            columns: screen.size().0,
            rows: screen.size().1,
        }),
        keyboard: outputs.keyboard.is_some(),
    }
}

/// Sends raw bytes, as guests do.
pub fn write_bytes(bytes: &[u8]) {
    let mut console = CONSOLE.lock();
    console.raw(bytes);
    console.sink().paint(false);
}

/// Sends the parts as one line of its own.
pub fn write_line(parts: &[&[u8]]) {
    let mut console = CONSOLE.lock();
    console.line(parts);
    console.sink().paint(false);
}

/// A byte that was typed, if there is one. Whoever waits for one calls this again and again, so a screen that waits to be
/// painted is painted here.
pub fn read_byte() -> Option<u8> {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    let byte = outputs.com1.read();
    // Most machines of a rack end here.
    if byte.is_some() || !outputs.has_more {
        return byte;
    }
    outputs.read_more()
}

/// Prints one message of Umbra's own.
pub fn print(message: fmt::Arguments<'_>) {
    message_to(&mut CONSOLE.lock(), "", message);
}

/// Prints one message if the console is free or soon will be: for NMI handlers, which may have interrupted its user.
pub fn try_print(message: fmt::Arguments<'_>) -> bool {
    CONSOLE.try_lock(1000).map(|mut console| message_to(&mut console, "", message)).is_some()
}

fn message_to(console: &mut Lines<Outputs>, label: &str, message: fmt::Arguments<'_>) {
    console.message(label, message);
    console.sink().paint(true);
}

/// Makes the console usable although its user may have died in the middle of a message.
///
/// # Safety
/// The other CPUs have been told to stop for good.
pub unsafe fn break_lock() {
    if CONSOLE.try_lock(POLLS).is_none() {
        // SAFETY: the holder is this CPU, which will not return to it, or one that has stopped.
        unsafe { CONSOLE.force_unlock() };
    }
}

/// Waits, not for ever, until everything has left: a machine that goes off takes the rest with it.
pub fn flush() {
    let mut console = CONSOLE.lock();
    let outputs = console.sink();
    outputs.paint(true);
    outputs.com1.flush();
    outputs.com2.flush();
}

struct Backend;

impl Log for Backend {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let label = match record.level() {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                Level::Info => "",
                Level::Debug => "debug: ",
                Level::Trace => "trace: ",
            };
            message_to(&mut CONSOLE.lock(), label, *record.args());
        }
    }

    fn flush(&self) {}
}
