//! From an owned machine to running VMs: virtualization on, the bundle read, VMs made and scheduled.
use super::instance::{Instance, Specification};
use crate::cpu::{self, smp, tsc};
use crate::hw::{with_vendor, OnVendor, Vendor};
use crate::machine::Machine;
use crate::sched::Scheduler;
use crate::{console, host_clock, power, report};
use alloc::vec::Vec;
use boot::bundle::manifest::{self, Manifest};
use boot::bundle::Bundle;
use boot::config::{AtEnd, Config};

/// Runs the VMs of the machine's bundle until they have ended, then ends the run.
pub fn start(machine: &Machine) -> ! {
    struct Start<'a>(&'a Machine);
    impl OnVendor for Start<'_> {
        fn run<V: Vendor>(self, vendor: V) -> ! {
            enable_everywhere(&vendor);
            run(self.0, vendor)
        }
    }

    log::info!("virtualization");
    let refusal = with_vendor(machine.features, Start(machine));
    power::halt_with_error(format_args!("{refusal}"))
}

/// Turns the extension on for every CPU that runs Umbra.
fn enable_everywhere<V: Vendor>(vendor: &V) {
    if let Err(refusal) = vendor.enable_on_this_cpu() {
        power::halt_with_error(format_args!("{refusal}"));
    }
    let mut enabled = 1;
    for cpu in cpu::all().iter().filter(|cpu| cpu.index() != cpu::number()) {
        if cpu.index() >= mmu::MAX_CPUS {
            log::warn!(
                "CPU {}: Umbra runs guests on {} CPUs at most; it stays without",
                cpu.index(),
                mmu::MAX_CPUS
            );
            continue;
        }
        match smp::call(cpu.index(), vendor, V::enable_on_this_cpu) {
            Ok(Ok(())) => enabled += 1,
            Ok(Err(refusal)) => log::warn!("CPU {}: {refusal}; it stays without guests", cpu.index()),
            Err(error) => log::warn!("CPU {}: {error:?}; it stays without guests", cpu.index()),
        }
    }
    log::info!("  {} on {enabled} of {} CPUs: {vendor}", vendor.name(), cpu::all().len());
}

fn run<V: Vendor>(machine: &Machine, vendor: V) -> ! {
    report::print(machine, &vendor);

    log::info!("boot bundle");
    if machine.ramdisk.is_empty() {
        power::halt_with_error(format_args!(
            "no boot bundle was loaded; give the boot loader a cpio archive with umbra.toml as first module"
        ));
    }
    let bundle = match Bundle::new(machine.ramdisk) {
        Ok(bundle) => bundle,
        Err(error) => power::halt_with_error(format_args!("boot bundle: {error}")),
    };
    verify(&bundle);
    log::info!("configuration");
    let config = match Config::load(&bundle) {
        Ok(config) => config,
        Err(error) => power::halt_with_error(format_args!("{error}")),
    };
    power::set_halt_at_end(config.at_end == AtEnd::Halt);
    if !console::choose(&config.console) {
        log::warn!("none of the consoles that umbra.toml names exists; going on with what there is");
    }

    log::info!("virtual machines");
    let wall_clock = (host_clock::read(machine.acpi.absent().rtc), tsc::read());
    let mut vms: Vec<(Specification<'_, V>, Instance<V>)> = Vec::new();
    for vm in &config.vms {
        log::info!(
            "vm \"{}\": {} vCPU{}, {} MiB",
            vm.name,
            vm.vcpus,
            if vm.vcpus == 1 { "" } else { "s" },
            vm.memory_bytes >> 20
        );
        let specification = Specification { config: vm, bundle: &bundle, machine, vendor, wall_clock };
        match specification.create() {
            Ok(instance) => vms.push((specification, instance)),
            Err(error) => power::halt_with_error(format_args!("vm \"{}\": {error}", vm.name)),
        }
    }
    log::info!("running");
    power::end(Scheduler::new(vms, &|| report::print(machine, &vendor)).run())
}

/// Holds the bundle against its manifest, if it has one.
fn verify(bundle: &Bundle<'_>) {
    let Some(manifest) = Manifest::of(bundle) else { return };
    log::info!("manifest");
    match manifest.verify(bundle, |name, size| log::info!("  {name:?}, {} KiB", size.div_ceil(1024))) {
        Ok(files) => log::info!("  {files} files are as {} lists them", manifest::FILE_NAME),
        Err(error) => power::halt_with_error(format_args!("{error}")),
    }
}
