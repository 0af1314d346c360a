//! Entries that the processor refuses: Umbra stops the VM and says in words which rule was broken.

use std::fs;

use anyhow::{ensure, Context, Result};
use elf::{endian::LittleEndian, ElfBytes};
use xtask::bundle::Bundle;
use xtask::emulator::{BochsCpu, Machine};

use crate::cases::Cases;
use crate::context::Ctx;
use crate::payload;
use crate::scenario::{Need, Scenario};

/// A VMCS field that is wrong at the first entry.
struct Spoilt {
    name: &'static str,
    /// Encoding: Intel SDM vol. 3, appendix B.
    field: u64,
    value: u64,
    /// What the report must say.
    says: &'static [&'static str],
}

const SPOILT: [Spoilt; 5] = [
    // More CR3-target values than any processor has: SDM vol. 3, 27.2.1.1.
    Spoilt { name: "control", field: 0x400a, value: 0x1ff, says: &["CR3-target"] },
    // CS of the host may not be null: 27.2.3.
    Spoilt { name: "host", field: 0x0c02, value: 0, says: &["host", "CS"] },
    // A task register that is unusable: 27.3.1.2.
    Spoilt { name: "guest_tr", field: 0x4822, value: 0x1_0000, says: &["TR"] },
    // RFLAGS with bit 1 clear: 27.3.1.4.
    Spoilt { name: "guest_rflags", field: 0x6820, value: 0, says: &["RFLAGS"] },
    // An activity that does not exist: 27.3.1.5.
    Spoilt { name: "guest_activity", field: 0x4826, value: 9, says: &["activity"] },
];

/// Symbol of the two words that say which field to spoil: `kernel/src/hw/vmx/spoil.rs`.
const SYMBOL: &str = "UMBRA_SPOILT_VMCS_FIELD";

pub(super) fn all() -> Vec<Scenario> {
    let scenario = |spoilt: &'static Spoilt| {
        Scenario::new(format!("refused_entry_{}", spoilt.name), move |ctx| refused(ctx, spoilt))
            .needs(&[Need::Grub, Need::Bochs])
    };
    SPOILT.iter().map(scenario).collect()
}

fn refused(ctx: &Ctx, spoilt: &Spoilt) -> Result<Cases> {
    let mut umbra = fs::read(&ctx.images.umbra)?;
    let at = file_offset(&umbra, SYMBOL)?;
    for (at, word) in [(at, spoilt.field), (at + 8, spoilt.value)] {
        umbra
            .get_mut(at..at + 8)
            .context("the symbol is outside the file")?
            .copy_from_slice(&word.to_le_bytes());
    }
    let path = ctx.dir.join("umbra-spoilt");
    fs::write(&path, umbra)?;
    // jmp $
    let bundle = Bundle::new("[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\n")
        .file("k", payload::multiboot(&[0xeb, 0xfe]));
    let machine = Machine { umbra: path, ..ctx.bochs(BochsCpu::SkylakeX) };
    let mut vm = ctx.boot(&machine, &bundle)?;
    let line = vm.expect("^umbra: vm \"a\": stopped: .*$")?;
    vm.end_with(64)?;
    ensure!(
        line.contains("refused to enter the guest: "),
        "`{line}` does not say that the entry was refused"
    );
    for word in spoilt.says {
        ensure!(line.contains(word), "`{line}` does not say {word}");
    }
    ensure!(line.contains("vcpu 0"), "`{line}` does not name the vCPU");
    Ok(Cases::passed())
}

/// Where in the ELF file the data of `symbol` is.
fn file_offset(file: &[u8], symbol: &str) -> Result<usize> {
    let elf = ElfBytes::<LittleEndian>::minimal_parse(file)?;
    let (symbols, names) = elf.symbol_table()?.context("Umbra's file has no symbols")?;
    let found = symbols
        .iter()
        .find(|it| names.get(it.st_name as usize).is_ok_and(|name| name == symbol))
        .with_context(|| format!("Umbra's file has no symbol {symbol}"))?;
    let segments = elf.segments().context("Umbra's file has no program headers")?;
    let segment = segments
        .iter()
        .find(|it| (it.p_vaddr..it.p_vaddr + it.p_filesz).contains(&found.st_value))
        .context("the symbol is in no segment of the file")?;
    Ok((segment.p_offset + found.st_value - segment.p_vaddr) as usize)
}
