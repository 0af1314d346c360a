//! From an owned machine to running VMs: virtualization on, the bundle read, VMs made and scheduled.
use super::instance::{Instance, Specification};
use crate::cpu::{self, smp, tsc};
use crate::hw::svm::{self, Svm};
use crate::hw::Vendor;
use crate::machine::Machine;
use crate::sched::Scheduler;
use crate::{host_clock, power};
use alloc::vec::Vec;
use boot::bundle::Bundle;
use boot::config::{AtEnd, Config};
use spin::Once;

/// Runs the VMs of the machine's bundle until they have ended, then ends the run.
pub fn start(machine: &Machine) -> ! {
    log::info!("virtualization");
    let svm = match Svm::detect(machine.features) {
        Ok(svm) => svm,
        Err(refusal) => power::halt_with_error(format_args!("{refusal}")),
    };
    enable_everywhere(svm);
    run(machine, svm)
}

/// Turns the extension on for every CPU that runs Umbra.
fn enable_everywhere(svm: Svm) {
    static SVM: Once<Svm> = Once::new();
    SVM.call_once(|| svm);
    let enable = |_: usize| {
        if let Some(svm) = SVM.get() {
            svm::enable_on_this_cpu(svm);
        }
    };
    enable(0);
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
        match smp::run_on_and_wait(cpu.index(), enable, 0) {
            Ok(()) => enabled += 1,
            Err(error) => log::warn!("CPU {}: {error:?}; it stays without guests", cpu.index()),
        }
    }
    log::info!("  SVM with nested paging on {enabled} of {} CPUs: {svm}", cpu::all().len());
}

fn run<V: Vendor>(machine: &Machine, vendor: V) -> ! {
    log::info!("configuration");
    if machine.ramdisk.is_empty() {
        power::halt_with_error(format_args!(
            "no boot bundle was loaded; give the boot loader a cpio archive with umbra.toml as first module"
        ));
    }
    let bundle = match Bundle::new(machine.ramdisk) {
        Ok(bundle) => bundle,
        Err(error) => power::halt_with_error(format_args!("boot bundle: {error}")),
    };
    let config = match Config::load(&bundle) {
        Ok(config) => config,
        Err(error) => power::halt_with_error(format_args!("{error}")),
    };
    power::set_halt_at_end(config.at_end == AtEnd::Halt);

    log::info!("virtual machines");
    let wall_clock = (host_clock::read(), tsc::read());
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
    power::end(Scheduler::new(vms).run())
}
