//! The boot report: what the machine is and what of it Umbra uses, in lines that a script can read. Pure.
//!
//! Each line is `report: SECTION: KEY=VALUE …`. Texts are quoted and have neither quotes nor backslashes inside; a list is
//! joined by commas, and empty or absent values are `none`. The first line is `report: begin: …`, the last one
//! `report: end: lines=N` with the number of lines in between.

#[cfg(target_os = "none")]
mod collect;

#[cfg(target_os = "none")]
pub use collect::print;

use crate::acpi::{Acpi, TableInfo};
use crate::console::Devices;
use crate::cpu::features::Features;
use crate::hw::{Capabilities, Capability};
use crate::mm::map::MemorySummary;
use crate::smbios::System;
use core::fmt::{self, Display};

/// Version of the lines' shape: a greater one when a key goes or changes its meaning.
const FORMAT: u32 = 1;
/// Tables beyond these are only counted, so that a report stays readable.
const MAX_TABLES: usize = 24;
/// Segments of PCI likewise.
const MAX_SEGMENTS: usize = 4;

/// Everything that the report tells.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The processors' features.
    pub features: &'a Features,
    /// Revision of the boot CPU's microcode, if it tells.
    pub microcode: Option<u64>,
    /// How many processors run Umbra.
    pub cpus_online: usize,
    /// Name of the virtualization extension.
    pub virtualization: &'a str,
    /// What it can do.
    pub capabilities: &'a Capabilities,
    /// Address spaces that a TLB tells apart.
    pub tlb_tags: u32,
    /// Sizes of memory at boot.
    pub memory: &'a MemorySummary,
    /// Bytes in free frames now.
    pub free_bytes: u64,
    /// The firmware's tables.
    pub acpi: &'a Acpi,
    /// Rate of the time-stamp counter in kHz.
    pub tsc_khz: u64,
    /// What it was measured against.
    pub tsc_timer: Option<&'a str>,
    /// Whether the local APICs are in x2APIC mode.
    pub x2apic: bool,
    /// Whether their timers take deadlines of the time-stamp counter.
    pub tsc_deadline: bool,
    /// The console's devices.
    pub console: &'a Devices,
    /// The boot protocol.
    pub protocol: &'a str,
    /// The boot loader's name.
    pub loader: &'a str,
    /// Whether the firmware is UEFI.
    pub uefi: bool,
    /// The machine by name.
    pub system: Option<&'a System>,
}

impl Facts<'_> {
    /// Gives `out` the lines one by one.
    pub fn write(&self, out: &mut dyn FnMut(fmt::Arguments<'_>)) {
        out(format_args!("report: begin: format={FORMAT} umbra={}", env!("CARGO_PKG_VERSION")));
        let mut lines = 0;
        let mut line = |arguments: fmt::Arguments<'_>| {
            lines += 1;
            out(format_args!("report: {arguments}"));
        };
        self.firmware(&mut line);
        self.processors(&mut line);
        self.memory(&mut line);
        self.timers(&mut line);
        self.console(&mut line);
        self.tables(&mut line);
        out(format_args!("report: end: lines={lines}"));
    }

    fn firmware(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        line(format_args!(
            "firmware: kind={} protocol={} loader={}",
            if self.uefi { "uefi" } else { "bios" },
            Word(self.protocol),
            Quoted(self.loader)
        ));
        let unknown = System::default();
        let system = self.system.unwrap_or(&unknown);
        line(format_args!(
            "system: manufacturer={} product={} serial={} uuid={}",
            Quoted(&system.manufacturer),
            Quoted(&system.product),
            Quoted(&system.serial),
            Maybe(system.uuid.map(Uuid))
        ));
    }

    fn processors(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let f = self.features;
        let listed = self.acpi.madt.as_ref().map_or(&[][..], |madt| &madt.processors);
        line(format_args!(
            "cpu: vendor={} brand={} family={} model={} stepping={} microcode={} listed={} enabled={} online={}",
            Word(&f.vendor),
            Quoted(&f.brand),
            f.family,
            f.model,
            f.stepping,
            Maybe(self.microcode.map(Hex)),
            listed.len(),
            listed.iter().filter(|cpu| cpu.enabled).count(),
            self.cpus_online
        ));
        let features = [
            ("nx", f.nx),
            ("1g-pages", f.pages_1g),
            ("la57", f.la57),
            ("pcid", f.pcid),
            ("invpcid", f.invpcid),
            ("smep", f.smep),
            ("smap", f.smap),
            ("umip", f.umip),
            ("pku", f.pku),
            ("xsave", f.xsave.is_some()),
            ("x2apic", f.x2apic),
            ("rdtscp", f.rdtscp),
            ("tsc-adjust", f.tsc_adjust),
            ("arat", f.arat),
        ];
        line(format_args!(
            "features: physical-bits={} hypervisor={} has={} lacks={}",
            f.physical_address_bits,
            YesNo(f.hypervisor),
            List(|| features.iter().filter(|(_, has)| *has).map(|(name, _)| *name)),
            List(|| features.iter().filter(|(_, has)| !*has).map(|(name, _)| *name)),
        ));
        let of = |which| {
            List(move || {
                self.capabilities.iter().filter(move |(_, found)| *found == which).map(|(name, _)| *name)
            })
        };
        line(format_args!(
            "virtualization: kind={} tlb-tags={} used={} unused={} missing={}",
            Quoted(self.virtualization),
            self.tlb_tags,
            of(Capability::Used),
            of(Capability::Unused),
            of(Capability::Missing)
        ));
    }

    fn memory(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let kib = |bytes: u64| bytes / 1024;
        let memory = self.memory;
        line(format_args!(
            "memory: total-kib={} usable-kib={} usable-below-4g-kib={} largest-kib={} free-kib={} in-use-kib={}",
            kib(memory.ram_bytes),
            kib(memory.usable_bytes),
            kib(memory.usable_below_4g_bytes),
            kib(memory.largest_bytes),
            kib(self.free_bytes),
            kib(memory.ram_bytes.saturating_sub(self.free_bytes))
        ));
    }

    fn timers(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let fadt = self.acpi.fadt.as_ref();
        let absent = self.acpi.absent();
        line(format_args!(
            "timers: tsc-khz={} tsc-source={} cpuid-khz={} invariant={} apic-timer={} hpet={} pm-timer={} rtc={}",
            self.tsc_khz,
            Quoted(self.tsc_timer.unwrap_or("CPUID")),
            Maybe(self.features.cpuid_tsc_khz),
            YesNo(self.features.invariant_tsc),
            if self.tsc_deadline { "tsc-deadline" } else { "one-shot" },
            Maybe(self.acpi.hpet.map(Hex)),
            Maybe(fadt.and_then(|fadt| fadt.pm_timer).map(|port| Hex(port.into()))),
            YesNo(!absent.rtc)
        ));
        let madt = self.acpi.madt.as_ref();
        line(format_args!(
            "interrupts: local-apic={} io-apics={} i8259={} i8042={}",
            if self.x2apic { "x2apic" } else { "xapic" },
            madt.map_or(0, |madt| madt.io_apics.len()),
            YesNo(madt.is_none_or(|madt| madt.has_8259)),
            YesNo(!absent.i8042)
        ));
        let segments = &self.acpi.pci_segments;
        if segments.is_empty() {
            line(format_args!("pci: ecam=none"));
        }
        for segment in segments.iter().take(MAX_SEGMENTS) {
            line(format_args!(
                "pci: ecam={:#x} segment={} first-bus={} last-bus={}",
                segment.address, segment.segment, segment.first_bus, segment.last_bus
            ));
        }
    }

    fn console(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let port = |port: Option<u16>| Maybe(port.map(|port| Hex(port.into())));
        line(format_args!(
            "console: com1={} com2={} framebuffer={} mode={} columns={} rows={} keyboard={}",
            port(self.console.com1),
            port(self.console.com2),
            Maybe(self.console.screen.map(|screen| Hex(screen.address))),
            Maybe(self.console.screen.map(|screen| screen.mode)),
            self.console.screen.map_or(0, |screen| screen.columns),
            self.console.screen.map_or(0, |screen| screen.rows),
            YesNo(self.console.keyboard)
        ));
    }

    fn tables(&self, line: &mut dyn FnMut(fmt::Arguments<'_>)) {
        let tables = &self.acpi.tables;
        for table in tables.iter().take(MAX_TABLES) {
            let TableInfo { signature, revision, oem, oem_table, length, address, checksum_ok } = table;
            line(format_args!(
                "acpi: signature={} revision={revision} oem={} oem-table={} length={length} address={address:#x} \
                 checksum={}",
                Bytes(signature),
                Bytes(oem),
                Bytes(oem_table),
                if *checksum_ok { "ok" } else { "bad" }
            ));
        }
        if tables.len() > MAX_TABLES {
            line(format_args!("acpi-more: tables={}", tables.len() - MAX_TABLES));
        }
    }
}

/// A text in quotes.
struct Quoted<'a>(&'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |c: char| if c.is_ascii() && !c.is_control() && c != '"' && c != '\\' { c } else { '?' };
        write!(f, "\"")?;
        self.0.chars().try_for_each(|c| write!(f, "{}", shown(c)))?;
        write!(f, "\"")
    }
}

/// Characters of a table, in quotes.
struct Bytes<'a>(&'a [u8]);

impl Display for Bytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What is no text at all is not made up.
        Quoted(core::str::from_utf8(self.0).map_or("?", |text| text.trim_end_matches(['\0', ' ']))).fmt(f)
    }
}

/// A word without spaces, or `none`.
struct Word<'a>(&'a str);

impl Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "none");
        }
        self.0.chars().try_for_each(|c| write!(f, "{}", if c.is_ascii_graphic() { c } else { '?' }))
    }
}

/// A value, or `none`.
struct Maybe<T>(Option<T>);

impl<T: Display> Display for Maybe<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => write!(f, "none"),
        }
    }
}

/// A number in base 16.
struct Hex(u64);

impl Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A UUID as RFC 9562 writes it.
struct Uuid([u8; 16]);

impl Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            let dash = if matches!(n, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// `yes` or `no`.
struct YesNo(bool);

impl Display for YesNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 { "yes" } else { "no" })
    }
}

/// Names with commas between, or `none`.
struct List<F>(F);

impl<F: Fn() -> I, I: Iterator<Item = &'static str>> Display for List<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = (self.0)();
        let Some(first) = names.next() else { return write!(f, "none") };
        f.write_str(first)?;
        names.try_for_each(|name| write!(f, ",{name}"))
    }
}

#[cfg(test)]
mod tests;
