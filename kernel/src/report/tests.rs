//! The report of made-up machines.
use super::*;
use crate::acpi::{Fadt, Madt, PciSegment, Processor};
use crate::console::ScreenInfo;

fn features() -> Features {
    let mut features = Features { family: 6, model: 85, stepping: 4, nx: true, ..Features::default() };
    features.vendor.push_str("GenuineIntel");
    features.brand.push_str("Some \"CPU\"");
    features
}

fn acpi() -> Acpi {
    let processor = |apic_id, enabled| Processor { apic_id, uid: apic_id, enabled, online_capable: false };
    Acpi {
        madt: Some(Madt { processors: vec![processor(0, true), processor(2, false)], ..Madt::default() }),
        fadt: Some(Fadt { pm_timer: Some(0x608), ..Fadt::default() }),
        hpet: Some(0xfed0_0000),
        pci_segments: vec![PciSegment { address: 0xb000_0000, segment: 0, first_bus: 0, last_bus: 255 }],
        tables: vec![TableInfo {
            address: 0x7fe_1234,
            signature: *b"FACP",
            length: 244,
            revision: 3,
            oem: *b"BOCHS ",
            oem_table: *b"BXPC\xff\0\0\0",
            checksum_ok: false,
        }],
        ..Acpi::default()
    }
}

fn report(acpi: &Acpi, system: Option<&System>, console: &Devices) -> Vec<String> {
    let features = features();
    let capabilities = Capabilities::from_iter([
        ("ept", Capability::Used),
        ("vpid", Capability::Used),
        ("tsc-scaling", Capability::Missing),
    ]);
    let facts = Facts {
        features: &features,
        microcode: Some(0x200_0065),
        cpus_online: 1,
        virtualization: "VMX with EPT",
        capabilities: &capabilities,
        tlb_tags: 65536,
        memory: &MemorySummary {
            ram_bytes: 1 << 30,
            usable_bytes: 1000 << 20,
            usable_below_4g_bytes: 1000 << 20,
            largest_bytes: 900 << 20,
        },
        free_bytes: 990 << 20,
        acpi,
        tsc_khz: 2_100_000,
        tsc_timer: Some("HPET"),
        x2apic: true,
        tsc_deadline: false,
        console,
        protocol: "multiboot2",
        loader: "GRUB 2.06-13+deb12u1",
        uefi: true,
        system,
    };
    let mut lines = Vec::new();
    facts.write(&mut |line| lines.push(line.to_string()));
    lines
}

#[test]
fn every_section_has_its_line() {
    let mut system = System { uuid: Some(*b"0123456789abcdef"), ..System::default() };
    system.manufacturer.push_str("Maker");
    let console = Devices {
        com1: Some(0x3f8),
        screen: Some(ScreenInfo { address: 0xfd00_0000, mode: "32-bit", columns: 114, rows: 37 }),
        keyboard: true,
        ..Devices::default()
    };
    assert_eq!(
        report(&acpi(), Some(&system), &console),
        [
            concat!("report: begin: format=1 umbra=", env!("CARGO_PKG_VERSION")),
            "report: firmware: kind=uefi protocol=multiboot2 loader=\"GRUB 2.06-13+deb12u1\"",
            "report: system: manufacturer=\"Maker\" product=\"\" serial=\"\" \
             uuid=30313233-3435-3637-3839-616263646566",
            "report: cpu: vendor=GenuineIntel brand=\"Some ?CPU?\" family=6 model=85 stepping=4 microcode=0x2000065 \
             listed=2 enabled=1 online=1",
            "report: features: physical-bits=0 hypervisor=no has=nx lacks=1g-pages,la57,pcid,invpcid,smep,smap,umip,\
             pku,xsave,x2apic,rdtscp,tsc-adjust,arat",
            "report: virtualization: kind=\"VMX with EPT\" tlb-tags=65536 used=ept,vpid unused=none missing=tsc-scaling",
            "report: memory: total-kib=1048576 usable-kib=1024000 usable-below-4g-kib=1024000 largest-kib=921600 \
             free-kib=1013760 in-use-kib=34816",
            "report: timers: tsc-khz=2100000 tsc-source=\"HPET\" cpuid-khz=none invariant=no apic-timer=one-shot \
             hpet=0xfed00000 pm-timer=0x608 rtc=yes",
            "report: interrupts: local-apic=x2apic io-apics=0 i8259=no i8042=yes",
            "report: pci: ecam=0xb0000000 segment=0 first-bus=0 last-bus=255",
            "report: console: com1=0x3f8 com2=none framebuffer=0xfd000000 mode=32-bit columns=114 rows=37 keyboard=yes",
            "report: acpi: signature=\"FACP\" revision=3 oem=\"BOCHS\" oem-table=\"?\" length=244 address=0x7fe1234 \
             checksum=bad",
            "report: end: lines=11",
        ]
    );
}

#[test]
fn a_bare_machine_has_a_report_too() {
    let lines = report(&Acpi::default(), None, &Devices::default());
    assert!(lines.contains(&"report: pci: ecam=none".to_owned()));
    assert!(
        lines.contains(&"report: system: manufacturer=\"\" product=\"\" serial=\"\" uuid=none".to_owned())
    );
    assert_eq!(lines.last().unwrap(), &format!("report: end: lines={}", lines.len() - 2));
}

#[test]
fn a_report_stays_within_forty_lines() {
    let mut acpi = acpi();
    acpi.tables = vec![acpi.tables[0]; 200];
    acpi.pci_segments = vec![acpi.pci_segments[0]; 50];
    let lines = report(&acpi, None, &Devices::default());
    assert!(lines.contains(&"report: acpi-more: tables=176".to_owned()));
    assert!(lines.len() <= 42, "{}", lines.len());
}

/// What the report's readers may count on.
#[test]
fn every_line_has_the_shape() {
    for line in report(&acpi(), None, &Devices::default()) {
        let rest = line.strip_prefix("report: ").unwrap();
        let (section, pairs) = rest.split_once(": ").unwrap();
        assert!(section.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{line}");
        // Outside of quotes spaces separate the pairs.
        let mut quoted = false;
        let bare: String = pairs
            .chars()
            .map(|c| {
                quoted ^= c == '"';
                if quoted && c == ' ' {
                    '_'
                } else {
                    c
                }
            })
            .collect();
        assert!(!quoted, "{line}");
        for pair in bare.split(' ') {
            let (key, value) = pair.split_once('=').unwrap_or_else(|| panic!("{pair:?} in {line}"));
            assert!(!key.is_empty() && !value.is_empty(), "{line}");
        }
    }
}
