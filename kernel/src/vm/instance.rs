//! Making a VM from its description: memory, kernel, tables, devices, vCPUs.

use super::acpi_tables;
use super::clock::VmClock;
use super::cpuid::{CpuidLeaf, CpuidTable, HostCpuid, VmShape};
use super::guest::{Board, Guest, Parts};
use super::layout::PCI_HOLE_START;
use super::load::{self, EntryState};
use super::memory::{HostMemory, NotEnoughMemory};
use super::notes::Notes;
use super::paging::GuestMemory;
use super::vcpu::Vcpu;
use crate::cpu::{compaction, tsc};
use crate::devices::apic_bus::ApicBus;
use crate::devices::chipset::{Chipset, ChipsetConfig};
use crate::hw::extended::XsaveFacts;
use crate::hw::{OutOfMemory, Vendor};
use crate::machine::Machine;
use crate::mm::FrameSize;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use boot::bundle::Bundle;
use boot::config::{self, MmuMode, PageSize as ConfiguredPageSize};
use core::fmt;
use mmu::PageSize;

/// What a VM is made from, as often as it is reset.
pub struct Specification<'a, V: Vendor> {
    /// Its part of umbra.toml.
    pub config: &'a config::Vm,
    /// Where its files are.
    pub bundle: &'a Bundle<'a>,
    /// The machine it runs on.
    pub machine: &'a Machine,
    /// The virtualization extension.
    pub vendor: V,
    /// Wall-clock time at the start, in seconds since 1970, and the host's TSC at that moment.
    pub wall_clock: (u64, u64),
}

/// A VM and its vCPUs.
pub struct Instance<V: Vendor> {
    /// What the vCPUs share.
    pub guest: Guest<V>,
    /// The vCPUs; the first one is the bootstrap processor.
    pub vcpus: Vec<Vcpu<V>>,
}

/// Why a VM could not be made, as a sentence.
#[derive(Debug)]
pub enum CreateError {
    /// Its memory does not fit the machine.
    Memory(NotEnoughMemory),
    /// Umbra's own memory ran out.
    OutOfMemory,
    /// A file cannot be loaded.
    Load(String),
    /// The configuration asks for what this version has not got.
    Unsupported(&'static str),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(error) => error.fmt(f),
            Self::OutOfMemory => f.write_str(
                "this machine has no memory left for the VM's tables; give its VMs less or the machine more",
            ),
            Self::Load(sentence) => f.write_str(sentence),
            Self::Unsupported(sentence) => f.write_str(sentence),
        }
    }
}

impl From<OutOfMemory> for CreateError {
    fn from(OutOfMemory: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl From<NotEnoughMemory> for CreateError {
    fn from(error: NotEnoughMemory) -> Self {
        Self::Memory(error)
    }
}

/// CPUID of the CPU that runs this.
struct ThisCpu;

impl HostCpuid for ThisCpu {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        let result = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        CpuidLeaf::new(result.eax, result.ebx, result.ecx, result.edx)
    }
}

impl<V: Vendor> Specification<'_, V> {
    /// Makes the VM, loaded and ready to run.
    pub fn create(&self) -> Result<Instance<V>, CreateError> {
        let config = self.config;
        let shadow = match (config.mmu, self.vendor.two_stages()) {
            (MmuMode::Shadow, _) => true,
            (MmuMode::Direct, Ok(())) => false,
            (MmuMode::Direct, Err(refusal)) => {
                log::info!("vm \"{}\": {refusal}; it runs on shadow tables", config.name);
                true
            }
        };
        if config.nested {
            return Err(CreateError::Unsupported(
                "nested = true is not in this version of Umbra; write nested = false",
            ));
        }
        let (frame_size, page_size) = match config.page_size {
            ConfiguredPageSize::Auto | ConfiguredPageSize::Size2M => (FrameSize::Size2M, PageSize::Size2M),
            ConfiguredPageSize::Size4K => (FrameSize::Size4K, PageSize::Size4K),
            ConfiguredPageSize::Size1G => (FrameSize::Size1G, PageSize::Size1G),
        };
        let notes = if shadow { Notes::TRACK } else { Notes::empty() };
        let mut ram = HostMemory::reserve(config.memory_bytes, frame_size, notes)?;
        ram.add_fixed_pages(self.vendor.guest_pages(shadow))?;
        let cpuid = CpuidTable::new(
            &ThisCpu,
            &VmShape {
                vcpus: config.vcpus as u8,
                max_phys_bits: self.machine.features.physical_address_bits.min(48),
                tsc_hz: tsc::khz() * 1000,
                sound_compaction: compaction::is_sound(),
            },
        );
        let rsdp = acpi_tables::write_tables(&ram, config.vcpus)
            .map_err(|error| CreateError::Load(error.to_string()))?;
        let entry = self.load(&ram, rsdp)?;

        let caps = *cpuid.caps();
        let memory = GuestMemory::new(&self.vendor, ram, caps.phys_bits, page_size, shadow)?;
        let bus = ApicBus::new(config.vcpus as usize).map_err(|_| CreateError::OutOfMemory)?;
        let now = tsc::read();
        let (epoch, at) = self.wall_clock;
        let below = config.memory_bytes.min(PCI_HOLE_START);
        let epoch_s = epoch + tsc::rate().ns(now - at) / 1_000_000_000;
        let chipset = Chipset::new(&ChipsetConfig {
            ram_below_4g: below,
            ram_above_4g: config.memory_bytes - below,
            cpus: config.vcpus as u16,
            epoch_s,
            exit_port: config.exit_port,
        });
        let guest = Guest::new(Parts {
            name: config.name.clone(),
            memory,
            board: Board::new(chipset),
            bus,
            clock: VmClock::new(tsc::rate(), now),
            cpuid,
            epoch_s,
            console: config.console,
        });
        let vcpus = self.vcpus(&guest, &entry)?;
        Ok(Instance { guest, vcpus })
    }

    fn load(&self, ram: &HostMemory, rsdp: u64) -> Result<EntryState, CreateError> {
        let config = self.config;
        let modules = load::configured::modules(config, self.bundle);
        let request = load::configured::request(config, self.bundle, &modules, rsdp);
        let loaded = load::load(&request, ram).map_err(|error| CreateError::Load(error.to_string()))?;
        log::info!(
            "vm \"{}\": {:?} at {:#x}, entry {:#x}",
            config.name,
            loaded.format,
            loaded.kernel.start,
            loaded.entry.rip
        );
        Ok(loaded.entry)
    }

    fn vcpus(&self, guest: &Guest<V>, entry: &EntryState) -> Result<Vec<Vcpu<V>>, CreateError> {
        let count = self.config.vcpus as usize;
        let facts = XsaveFacts::detect(self.machine.features);
        let mut vcpus = Vec::new();
        vcpus.try_reserve_exact(count).map_err(|_| CreateError::OutOfMemory)?;
        for index in 0..count {
            vcpus.push(Vcpu::new(&self.vendor, guest, index, facts)?);
        }
        if let Some(first) = vcpus.first_mut() {
            first.start(entry);
        }
        Ok(vcpus)
    }
}
