//! Processor models by name: those of Bochs that Umbra is tested on, and what an emulator says it has.

use std::collections::BTreeSet;
use std::process::Stdio;

use anyhow::{bail, Context, Result};

use super::machine::Kind;
use super::{bochs, qemu};
use crate::exec::CommandLine;

/// The processors of Bochs that differ in what they offer to a hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BochsCpu {
    /// AMD with SVM and nested paging.
    Ryzen,
    /// Intel with VMX, EPT, VPID, unrestricted guest, APIC virtualization and page-modification log.
    SkylakeX,
    /// Intel with VMX, EPT, VPID, unrestricted guest, APIC virtualization and AVX2, but without XSAVES and AVX-512.
    Haswell,
    /// Intel with VMX, EPT, VPID and unrestricted guest, but without APIC virtualization: bits 8 and 9 of
    /// IA32_VMX_PROCBASED_CTLS2 are clear; nor has its EPT accessed and dirty flags.
    Arrandale,
    /// Intel with VMX, EPT and VPID, but without unrestricted guest: bit 39 of IA32_VMX_PROCBASED_CTLS2 is clear (Intel
    /// SDM vol. 3, A.3.3).
    Lynnfield,
    /// Intel with VMX, but without EPT: bit 33 of that register is clear as well.
    Penryn,
    /// Intel with 64-bit mode, but without VMX.
    Prescott,
}

impl BochsCpu {
    /// The model's name in Bochs's configuration.
    pub fn model(self) -> &'static str {
        match self {
            Self::Ryzen => "ryzen",
            Self::SkylakeX => "corei7_skylake_x",
            Self::Haswell => "corei7_haswell_4770",
            Self::Arrandale => "corei5_arrandale_m520",
            Self::Lynnfield => "corei5_lynnfield_750",
            Self::Penryn => "core2_penryn_t9600",
            Self::Prescott => "p4_prescott_celeron_336",
        }
    }
}

/// Refuses a processor `model` that the emulator does not have; for QEMU, a model may be followed by features.
pub fn check_model(kind: Kind, model: &str) -> Result<()> {
    let (program, question, name) = match kind {
        Kind::Qemu => (qemu::PROGRAM, ["-cpu", "help"], model.split(',').next().unwrap_or_default()),
        Kind::Bochs => (bochs::PROGRAM, ["-help", "cpu"], model),
    };
    let line = CommandLine::new(program).args(question);
    // Bochs answers on standard error.
    let answer = line.command().stdin(Stdio::null()).output();
    let answer = answer.with_context(|| format!("cannot start `{line}`"))?;
    let answer = [answer.stdout, answer.stderr].concat();
    judge(kind, name, &models_in(kind, &String::from_utf8_lossy(&answer)))
}

fn judge(kind: Kind, name: &str, models: &BTreeSet<String>) -> Result<()> {
    // An answer that cannot be read refuses nothing: the emulator itself will.
    if models.is_empty() || models.contains(name) {
        return Ok(());
    }
    let models: Vec<_> = models.iter().map(String::as_str).collect();
    bail!("{} has no processor `{name}`; --cpu takes one of {}", kind.name(), models.join(", "))
}

/// The models that an emulator's list names.
fn models_in(kind: Kind, answer: &str) -> BTreeSet<String> {
    let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    match kind {
        // Lines `x86 NAME  DESCRIPTION`, since QEMU 9.2 without `x86`, up to the features.
        Kind::Qemu => answer
            .lines()
            .skip_while(|line| !line.starts_with("Available CPUs"))
            .skip(1)
            .take_while(|line| !line.trim().is_empty())
            .filter_map(|line| line.trim().trim_start_matches("x86 ").split_whitespace().next())
            .filter(is_name)
            .map(str::to_owned)
            .collect(),
        // One line each after a title and an empty line.
        Kind::Bochs => answer
            .lines()
            .skip_while(|line| !line.starts_with("Supported CPU models"))
            .skip(1)
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .take_while(is_name)
            .map(str::to_owned)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bochss_list_is_understood() {
        let answer = "=====\n  Bochs x86 Emulator 2.7\n=====\n0i[      ] LTDL_LIBRARY_PATH not set.\n\
                      Supported CPU models:\n\nbx_generic\npentium\nryzen\n\n0i[SIM   ] quit_sim called\n";
        let models = models_in(Kind::Bochs, answer);
        assert_eq!(models.iter().collect::<Vec<_>>(), ["bx_generic", "pentium", "ryzen"]);
        assert!(judge(Kind::Bochs, "ryzen", &models).is_ok());
        assert_eq!(
            judge(Kind::Bochs, "z80", &models).unwrap_err().to_string(),
            "Bochs has no processor `z80`; --cpu takes one of bx_generic, pentium, ryzen"
        );
    }

    #[test]
    fn qemus_lists_are_understood() {
        let old = "Available CPUs:\nx86 486                   (alias)\nx86 EPYC-v1   AMD EPYC\n\
                   x86 max                   Enables all\n\nRecognized CPUID flags:\n  3dnow abm\n";
        let new =
            "Available CPUs:\n  486  (alias)\n  EPYC-v1  AMD EPYC\n  max  Enables all\n\nRecognized CPUID flags:\n";
        for answer in [old, new] {
            let models = models_in(Kind::Qemu, answer);
            assert_eq!(models.iter().collect::<Vec<_>>(), ["486", "EPYC-v1", "max"]);
            let error = judge(Kind::Qemu, "ryzen", &models).unwrap_err().to_string();
            assert!(error.starts_with("QEMU has no processor `ryzen`"), "{error}");
        }
    }

    #[test]
    fn an_answer_that_cannot_be_read_refuses_nothing() {
        assert!(judge(Kind::Bochs, "anything", &models_in(Kind::Bochs, "what?\n")).is_ok());
    }
}
