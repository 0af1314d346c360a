//! What can be wrong with a machine, a configuration or a guest: each ends in one sentence that says what to do.

use std::fs;

use anyhow::{bail, ensure, Context, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{BochsCpu, Machine, Vmx};
use xtask::size::Size;

use crate::cases::Cases;
use crate::context::Ctx;
use crate::payload;
use crate::scenario::{Need, Scenario};

/// Umbra refused to boot.
const REFUSED: u8 = 65;
/// A virtual machine was stopped because of an error.
const STOPPED: u8 = 64;

pub(super) fn all() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = CONFIGURATIONS
        .iter()
        .map(|wrong| Scenario::new(format!("config_{}", wrong.name), |ctx| configuration(ctx, wrong)))
        .collect();
    all.extend([
        Scenario::new("no_svm", no_svm),
        Scenario::new("no_vmx", |ctx| unfit(ctx, BochsCpu::Prescott, "VMX"))
            .needs(&[Need::Grub, Need::Bochs]),
        Scenario::new("vmx_locked_off", vmx_locked_off).needs(&[Need::Grub, Need::Bochs]),
        Scenario::new("small_machine", small_machine),
        Scenario::new("guest_larger_than_host", guest_larger_than_host),
        Scenario::new("initrd_missing", initrd_missing),
        Scenario::new("kernel_not_recognised", kernel_not_recognised),
        Scenario::new("no_bundle_configuration", no_configuration),
        Scenario::new("kernel_truncated", kernel_truncated).needs(&[Need::Linux]),
        Scenario::new("kernel_missing", kernel_missing),
        Scenario::new("bundle_truncated", bundle_truncated),
        Scenario::new("bundle_damaged", bundle_damaged),
        Scenario::new("bundle_file_not_listed", bundle_file_not_listed),
        Scenario::new("bundle_verified", bundle_verified),
        Scenario::new("guest_jumps_to_nowhere", jumps_to_nowhere),
        Scenario::new("guest_executes_garbage", executes_garbage),
        Scenario::new("guest_triple_faults", triple_faults),
    ]);
    all
}

/// A configuration that is wrong in one way.
struct Wrong {
    name: &'static str,
    config: &'static str,
    /// Where Umbra must see it: line and column.
    place: &'static str,
    /// A word of what it must say.
    says: &'static str,
}

/// Each but the syntax error is a whole configuration with one mistake.
const CONFIGURATIONS: [Wrong; 12] = [
    Wrong { name: "syntax", config: "[[vm]\nname = \"a\"\n", place: "1:", says: "" },
    Wrong {
        name: "unknown_key",
        config: "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\nmemroy = \"1G\"\n",
        place: "5:1",
        says: "memroy",
    },
    Wrong {
        name: "unknown_table",
        config: "[host]\ncpus = 2\n[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\n",
        place: "1:",
        says: "host",
    },
    Wrong {
        name: "no_kernel",
        config: "[[vm]]\nname = \"a\"\nmemory = \"16M\"\n",
        place: "1:",
        says: "kernel",
    },
    Wrong {
        name: "memory_not_a_size",
        config: "[[vm]]\nname = \"a\"\nmemory = \"plenty\"\nkernel = \"k\"\n",
        place: "3:10",
        says: "plenty",
    },
    Wrong {
        name: "memory_odd",
        config: "[[vm]]\nname = \"a\"\nmemory = \"1025K\"\nkernel = \"k\"\n",
        place: "3:10",
        says: "1025K",
    },
    Wrong {
        name: "memory_tiny",
        config: "[[vm]]\nname = \"a\"\nmemory = \"64K\"\nkernel = \"k\"\n",
        place: "3:10",
        says: "64K",
    },
    Wrong {
        name: "too_many_cpus",
        config: "[[vm]]\nname = \"a\"\nvcpus = 65\nmemory = \"16M\"\nkernel = \"k\"\n",
        place: "3:9",
        says: "65",
    },
    Wrong {
        name: "vcpus_not_a_number",
        config: "[[vm]]\nname = \"a\"\nvcpus = \"two\"\nmemory = \"16M\"\nkernel = \"k\"\n",
        place: "3:9",
        says: "",
    },
    Wrong {
        name: "unknown_mmu",
        config: "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\nmmu = \"magic\"\n",
        place: "5:7",
        says: "magic",
    },
    Wrong {
        name: "two_of_a_name",
        config:
            "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\n[[vm]]\nname = \"a\"\nmemory = \"16M\"\n\
                 kernel = \"k\"\n",
        place: "6:",
        says: "a",
    },
    Wrong { name: "no_machine", config: "[umbra]\nat_end = \"poweroff\"\n", place: "", says: "vm" },
];

/// Boots, expects Umbra to refuse, and returns its sentence.
fn refusal(ctx: &Ctx, machine: &Machine, bundle: &Bundle) -> Result<String> {
    let mut vm = ctx.boot(machine, bundle)?;
    let line = vm.expect("^umbra: error: .*$")?;
    let outcome = vm.end()?;
    ensure!(
        outcome.status == Some(REFUSED),
        "the run ended with {:?} instead of status {REFUSED}",
        outcome.status
    );
    let errors = outcome.log.lines().filter(|line| line.starts_with("umbra: error: ")).count();
    ensure!(errors == 1, "there are {errors} error sentences instead of one");
    Ok(line)
}

fn require_words(sentence: &str, words: &[&str]) -> Result<Cases> {
    let lower = sentence.to_lowercase();
    match words.iter().find(|word| !lower.contains(&word.to_lowercase())) {
        Some(word) => bail!("`{sentence}` does not say {word}"),
        None => Ok(Cases::passed()),
    }
}

fn configuration(ctx: &Ctx, wrong: &Wrong) -> Result<Cases> {
    let bundle = Bundle::new(wrong.config).file("k", payload::multiboot(&[0xf4]));
    let sentence = refusal(ctx, &ctx.machine(), &bundle)?;
    let place =
        if wrong.place.is_empty() { "umbra.toml".to_owned() } else { format!("umbra.toml:{}", wrong.place) };
    require_words(&sentence, &[&place, wrong.says])
}

/// A virtual machine that halts, with `more` in its configuration.
fn small_bundle(more: &str) -> Bundle {
    let config =
        format!("[[vm]]\nname = \"a\"\nkernel = \"k\"\nexit_port = 0xf4\non_reset = \"stop\"\n{more}\n");
    Bundle::new(config).file("k", payload::multiboot(&[0xf4]))
}

fn no_svm(ctx: &Ctx) -> Result<Cases> {
    let machine = Machine { cpu: Some("max,-svm".into()), ..ctx.machine() };
    require_words(&refusal(ctx, &machine, &small_bundle("memory = \"16M\""))?, &["SVM"])
}

/// A processor of Bochs that lacks what Umbra must have.
fn unfit(ctx: &Ctx, cpu: BochsCpu, lacks: &str) -> Result<Cases> {
    require_words(&refusal(ctx, &ctx.bochs(cpu), &small_bundle("memory = \"16M\""))?, &[lacks])
}

fn vmx_locked_off(ctx: &Ctx) -> Result<Cases> {
    let machine = Machine { vmx: Vmx::LockedOff, ..ctx.bochs(BochsCpu::SkylakeX) };
    require_words(&refusal(ctx, &machine, &small_bundle("memory = \"16M\""))?, &["VMX", "firmware"])
}

/// Not enough for Umbra and this guest.
fn small_machine(ctx: &Ctx) -> Result<Cases> {
    let machine = Machine { memory: Size::mib(64), ..ctx.machine() };
    require_words(&refusal(ctx, &machine, &small_bundle("memory = \"64M\""))?, &["memory"])
}

fn guest_larger_than_host(ctx: &Ctx) -> Result<Cases> {
    require_words(&refusal(ctx, &ctx.machine(), &small_bundle("memory = \"64G\""))?, &["memory", "a"])
}

fn initrd_missing(ctx: &Ctx) -> Result<Cases> {
    let bundle = small_bundle("memory = \"16M\"\ninitrd = \"ramdisk.img\"");
    require_words(&refusal(ctx, &ctx.machine(), &bundle)?, &["ramdisk.img", "umbra.toml:7:10"])
}

fn kernel_not_recognised(ctx: &Ctx) -> Result<Cases> {
    let config = "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"notes.txt\"\n";
    let bundle = Bundle::new(config).file("notes.txt", "no kernel at all\n");
    require_words(&refusal(ctx, &ctx.machine(), &bundle)?, &["notes.txt"])
}

fn no_configuration(ctx: &Ctx) -> Result<Cases> {
    require_words(&refusal(ctx, &ctx.machine(), &Bundle::new(""))?, &["umbra.toml"])
}

fn kernel_truncated(ctx: &Ctx) -> Result<Cases> {
    let whole = fs::read(ctx.linux()?.kernel)?;
    let config = "[[vm]]\nname = \"a\"\nmemory = \"512M\"\nkernel = \"vmlinuz\"\n";
    let bundle = Bundle::new(config).file("vmlinuz", &whole[..whole.len() / 3]);
    require_words(&refusal(ctx, &ctx.machine(), &bundle)?, &["vmlinuz"])
}

fn kernel_missing(ctx: &Ctx) -> Result<Cases> {
    let bundle = Bundle::new("[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"vmlinuz\"\n");
    require_words(
        &refusal(ctx, &ctx.machine(), &bundle)?,
        &["umbra.toml:4:10", "vmlinuz", "not in the bundle"],
    )
}

/// What is left of a download that broke off.
fn bundle_truncated(ctx: &Ctx) -> Result<Cases> {
    let archive = small_bundle("memory = \"16M\"").archive()?;
    let bundle = Bundle::unchecked(&archive[..archive.len() / 2]);
    require_words(&refusal(ctx, &ctx.machine(), &bundle)?, &["bundle is cut short", "byte"])
}

/// The configuration changed after its manifest was made.
fn bundle_damaged(ctx: &Ctx) -> Result<Cases> {
    let good = small_bundle("memory = \"16M\"").with_manifest().archive()?;
    let at = good.windows(3).position(|bytes| bytes == b"16M").context("the configuration is not there")?;
    let mut archive = good.clone();
    archive[at] = b'2';
    let sentence = refusal(ctx, &ctx.machine(), &Bundle::unchecked(archive))?;
    let listed =
        good.windows(12).position(|bytes| bytes == b"  umbra.toml").context("there is no manifest")?;
    let expected = std::str::from_utf8(&good[listed - 64..listed])?;
    require_words(&sentence, &["SHA256SUMS:1", "umbra.toml", &format!("expected is {expected}")])
}

fn bundle_file_not_listed(ctx: &Ctx) -> Result<Cases> {
    // The manifest is a file like any other, here one of nothing.
    let bundle = small_bundle("memory = \"16M\"").file("SHA256SUMS", "");
    require_words(&refusal(ctx, &ctx.machine(), &bundle)?, &["SHA256SUMS does not list", "umbra.toml"])
}

/// A bundle that is as its manifest says is taken, and the log says so before the first virtual machine is made.
fn bundle_verified(ctx: &Ctx) -> Result<Cases> {
    let mut vm = ctx.boot(&ctx.machine(), &small_bundle("memory = \"16M\"").with_manifest())?;
    vm.expect("^umbra: manifest$")?;
    vm.expect("^umbra:   2 files are as SHA256SUMS lists them$")?;
    vm.expect("^umbra: vm \"a\": halted")?;
    vm.end_with(0)?;
    Ok(Cases::passed())
}

/// Runs `code` as a guest and returns the line with which Umbra ends it.
fn end_of(ctx: &Ctx, code: &[u8], regex: &str, status: Option<u8>) -> Result<String> {
    let bundle = Bundle::new(
        "[[vm]]\nname = \"bad\"\nmemory = \"16M\"\nkernel = \"k\"\nexit_port = 0xf4\non_reset = \"stop\"\n",
    )
    .file("k", payload::multiboot(code));
    let mut vm = ctx.boot(&ctx.machine(), &bundle)?;
    let line = vm.expect(regex)?;
    let outcome = vm.end()?;
    ensure!(
        status.is_none() || outcome.status == status,
        "the run ended with {:?} instead of {status:?}",
        outcome.status
    );
    ensure!(!outcome.log.contains("umbra: panic"), "Umbra itself panicked");
    Ok(line)
}

/// There is neither memory nor a device to fetch from.
fn jumps_to_nowhere(ctx: &Ctx) -> Result<Cases> {
    // mov eax, 0xd0000000; jmp eax
    let code = [0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0];
    let line = end_of(ctx, &code, "^umbra: vm \"bad\": stopped: .*$", Some(STOPPED))?;
    require_words(&line, &["vcpu 0", "rip 0xd0000000"])
}

/// Without an interrupt table the first invalid opcode becomes a triple fault, as on a real machine.
fn executes_garbage(ctx: &Ctx) -> Result<Cases> {
    end_of(ctx, &[0xff; 64], "^umbra: vm \"bad\": (reset|stopped: ).*$", None)?;
    Ok(Cases::passed())
}

fn triple_faults(ctx: &Ctx) -> Result<Cases> {
    // lidt of six zero bytes that follow; int3
    let idt = (payload::ENTRY + 8).to_le_bytes();
    let code = [0x0f, 0x01, 0x1d, idt[0], idt[1], idt[2], idt[3], 0xcc, 0, 0, 0, 0, 0, 0];
    end_of(ctx, &code, "^umbra: vm \"bad\": (reset|stopped: ).*$", None)?;
    Ok(Cases::passed())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Umbra refuses at boot is refused on the host before an image is written, with the same words.
    #[test]
    fn the_host_refuses_the_same_configurations() {
        let path = std::env::temp_dir().join(format!("umbra-wrong-{}.toml", std::process::id()));
        for wrong in &CONFIGURATIONS {
            fs::write(&path, wrong.config).unwrap();
            let sentence = Bundle::load(&path).unwrap_err().to_string();
            assert!(
                sentence.contains(&format!(".toml:{}", wrong.place)) || wrong.place.is_empty(),
                "{}: {sentence}",
                wrong.name
            );
            assert!(sentence.contains(wrong.says), "{}: {sentence}", wrong.name);
            println!("{}: {sentence}", wrong.name);
        }
        fs::remove_file(path).unwrap();
    }
}
