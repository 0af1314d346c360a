//! The panic report: where, why, on which CPU, and how it came there. Then the end of the run.

use crate::cpu::{self, backtrace};
use crate::{console, power};
use core::panic::PanicInfo;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let frame = backtrace::frame_pointer();
    // A panic in here finds the emergency begun by this CPU and ends the run at once.
    power::begin_emergency();
    let cpu = cpu::number();
    match info.location() {
        Some(at) => {
            console::print(format_args!(
                "panic on CPU {cpu} at {}:{}: {}",
                at.file(),
                at.line(),
                info.message()
            ));
        }
        None => console::print(format_args!("panic on CPU {cpu}: {}", info.message())),
    }
    backtrace::print(frame);
    power::end(power::PANIC)
}
