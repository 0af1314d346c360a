//! Cases: run one, compare, print its line; and the end of the program.
use crate::cpu::outb;
use crate::dev::lapic;
use crate::multiboot::boot;
use crate::trap::{catch, Fault, Name};
use crate::{machine, platform, println};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// Port that ends the machine. QEMU's isa-debug-exit makes (value << 1) | 1 of it.
pub const EXIT_PORT: u16 = 0xf4;

static PASSED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);
static SKIPPED: AtomicU32 = AtomicU32::new(0);

/// Text of bounded length; what does not fit is cut off.
struct Note {
    bytes: [u8; 320],
    len: usize,
}

impl Write for Note {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len < self.bytes.len() {
                self.bytes[self.len] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

impl Note {
    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("(text cut inside a character)")
    }
}

/// One running case. The first mismatch is the one that is reported.
pub struct Case {
    note: Note,
    failed: bool,
    skipped: bool,
    checks: u32,
}

impl Case {
    /// `what` must be `want`.
    pub fn eq(&mut self, what: &str, got: impl Into<u64>, want: impl Into<u64>) {
        let (got, want) = (got.into(), want.into());
        self.check(got == want, format_args!("{what} {want:#x}, got {got:#x}"));
    }

    /// `what` must be `want` in the bits of `mask`.
    pub fn masked(&mut self, what: &str, got: impl Into<u64>, want: impl Into<u64>, mask: u64) {
        self.eq(what, got.into() & mask, want.into() & mask);
    }

    /// `what` must lie between `low` and `high`, both included.
    pub fn within(&mut self, what: &str, got: u64, low: u64, high: u64) {
        self.check((low..=high).contains(&got), format_args!("{what} from {low} to {high}, got {got}"));
    }

    /// `what` must be true.
    pub fn yes(&mut self, what: &str, got: bool) {
        self.check(got, format_args!("{what}, got the opposite"));
    }

    /// `holds` must be true; `note` reads "EXPECTED, got SOMETHING".
    pub fn check(&mut self, holds: bool, note: fmt::Arguments<'_>) {
        self.checks += 1;
        if !holds && !self.failed {
            self.failed = true;
            let _ = self.note.write_fmt(note);
        }
    }

    /// `got` must be fault `vector`, with this error code if one is given. Returns the fault for closer looks.
    pub fn faults<R>(&mut self, what: &str, got: Result<R, Fault>, vector: u8, error: Option<u64>) -> Fault {
        match got {
            Ok(_) => {
                self.check(false, format_args!("{what}: {}, got no fault", Name(vector)));
                Fault::default()
            }
            Err(fault) => {
                let right = fault.vector == vector && error.is_none_or(|error| error == fault.error);
                match error {
                    Some(error) => {
                        self.check(right, format_args!("{what}: {}({error:#x}), got {fault}", Name(vector)))
                    }
                    None => self.check(right, format_args!("{what}: {}, got {fault}", Name(vector))),
                }
                fault
            }
        }
    }

    /// `got` must not be a fault. Returns the value if there is one.
    pub fn works<R>(&mut self, what: &str, got: Result<R, Fault>) -> Option<R> {
        match got {
            Ok(value) => {
                self.checks += 1;
                Some(value)
            }
            Err(fault) => {
                self.check(false, format_args!("{what}: no fault, got {fault}"));
                None
            }
        }
    }

    /// The case does not apply here. Use it alone, before any comparison.
    pub fn skip(&mut self, reason: &str) {
        self.skipped = true;
        let _ = self.note.write_str(reason);
    }

    /// Skips on bare TCG, with what its CPUID, MSRs or devices do wrong. True when skipped.
    pub fn skip_on_bare_tcg(&mut self, wrong: &str) -> bool {
        platform::bare_tcg() && self.skip_on_tcg(wrong)
    }

    /// Skips on TCG, bare or under Umbra, with what its processor does wrong. True when skipped.
    pub fn skip_on_tcg(&mut self, wrong: &str) -> bool {
        if platform::tcg() {
            self.skip("QEMU TCG is known wrong here: ");
            let _ = self.note.write_str(wrong);
        }
        platform::tcg()
    }

    /// Skips in x2APIC mode, with what that lacks. True when skipped.
    pub fn skip_in_x2apic_mode(&mut self, lacks: &str) -> bool {
        if lapic::x2apic() {
            self.skip("x2APIC mode has no ");
            let _ = self.note.write_str(lacks);
        }
        lapic::x2apic()
    }

    /// Skips on Bochs under a hypervisor that uses its SVM, with what that does wrong. True when skipped.
    pub fn skip_on_bochs_svm(&mut self, wrong: &str) -> bool {
        if platform::bochs_svm() {
            self.skip("Bochs's SVM is known wrong here: ");
            let _ = self.note.write_str(wrong);
        }
        platform::bochs_svm()
    }

    /// Skips on Bochs under a hypervisor that uses its VMX without a preemption timer, with what that does wrong. True when
    /// skipped.
    pub fn skip_on_bochs_without_timer(&mut self, wrong: &str) -> bool {
        let here = platform::bochs_vmx() && platform::no_preemption_timer();
        if here {
            self.skip("Bochs's VMX is known wrong here: ");
            let _ = self.note.write_str(wrong);
        }
        here
    }

    /// Skips on Bochs under a hypervisor that uses its VMX, with what that does wrong. True when skipped.
    pub fn skip_on_bochs_vmx(&mut self, wrong: &str) -> bool {
        if platform::bochs_vmx() {
            self.skip("Bochs's VMX is known wrong here: ");
            let _ = self.note.write_str(wrong);
        }
        platform::bochs_vmx()
    }
}

/// A case that is one fault: `run` must end in `vector` with `error`.
pub fn fault_case<R>(name: &str, vector: u8, error: Option<u64>, run: impl FnOnce() -> R) {
    case(name, |t| {
        let got = catch(run);
        t.faults("the instruction", got, vector, error);
    });
}

/// Runs one case and prints its line. `name` is stable: scenarios refer to it.
pub fn case(name: &str, run: impl FnOnce(&mut Case)) {
    if boot().value("only").is_some_and(|prefix| !name.starts_with(prefix)) {
        return;
    }
    if boot().word("trace") {
        println!("run {name}");
    }
    let mut case = Case { note: Note { bytes: [0; 320], len: 0 }, failed: false, skipped: false, checks: 0 };
    let ended = catch(|| run(&mut case));
    machine::baseline();
    if let Err(fault) = ended {
        case.check(false, format_args!("no fault in the case itself, got {fault}"));
    }
    if case.failed {
        FAILED.fetch_add(1, SeqCst);
        println!("FAIL {name}: expected {}", case.note.as_str());
    } else if case.skipped {
        SKIPPED.fetch_add(1, SeqCst);
        println!("skip {name}: {}", case.note.as_str());
    } else if case.checks == 0 {
        FAILED.fetch_add(1, SeqCst);
        println!("FAIL {name}: expected a comparison, got none");
    } else {
        PASSED.fetch_add(1, SeqCst);
        println!("ok {name}");
    }
}

/// Prints the sums and ends the machine.
pub fn finish() -> ! {
    let (passed, failed) = (PASSED.load(SeqCst), FAILED.load(SeqCst));
    println!("done {passed} passed, {failed} failed");
    // A program that found nothing to do, by a wrong `only=` for example, has not shown anything.
    exit(u8::from(failed != 0 || passed + SKIPPED.load(SeqCst) == 0))
}

/// Ends the program at once because something happened that no case can own.
pub fn abort(why: fmt::Arguments<'_>) -> ! {
    println!("FAIL {why}");
    FAILED.fetch_add(1, SeqCst);
    finish()
}

/// Writes `value` to the exit port; where nothing listens, halts for good.
pub fn exit(value: u8) -> ! {
    outb(EXIT_PORT, value);
    loop {
        crate::exec!("cli", "hlt");
    }
}
