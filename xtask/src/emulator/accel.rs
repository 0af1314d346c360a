//! Emulation or hardware: whether this host's KVM can run a hypervisor.

use std::fs;
use std::path::Path;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Accel {
    /// KVM where it offers nested virtualization, else emulation.
    #[default]
    Auto,
    /// Emulation.
    Tcg,
    /// KVM with nested virtualization; emulation where there is none.
    Kvm,
}

/// What is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceleration {
    /// Emulation.
    Tcg,
    /// KVM with nested virtualization.
    Kvm,
}

/// What the host says about its KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kvm {
    /// `/dev/kvm` can be opened for reading and writing.
    usable: bool,
    /// `/dev/kvm` is there.
    present: bool,
    /// The value of the vendor module's `nested` parameter.
    nested: Option<String>,
}

impl Accel {
    /// Decides, and says why in a sentence when the answer is not the obvious one.
    pub fn choose(self) -> (Acceleration, Option<String>) {
        self.decide(&Kvm::ask())
    }

    fn decide(self, kvm: &Kvm) -> (Acceleration, Option<String>) {
        if self == Self::Tcg {
            return (Acceleration::Tcg, None);
        }
        match kvm.obstacle() {
            None => (
                Acceleration::Kvm,
                Some("this host's KVM offers nested virtualization, so it is used".into()),
            ),
            Some(_) if self == Self::Auto && !kvm.present => (Acceleration::Tcg, None),
            Some(why) => (Acceleration::Tcg, Some(format!("{why}, so the machine is emulated (TCG)"))),
        }
    }
}

impl Kvm {
    fn ask() -> Self {
        let device = Path::new("/dev/kvm");
        // One of the two is loaded, by the host's vendor.
        let nested = ["kvm_amd", "kvm_intel"]
            .iter()
            .find_map(|module| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok());
        Self {
            usable: fs::OpenOptions::new().read(true).write(true).open(device).is_ok(),
            present: device.exists(),
            nested: nested.map(|value| value.trim().to_owned()),
        }
    }

    /// Why a hypervisor cannot run on this KVM.
    fn obstacle(&self) -> Option<String> {
        match self.nested.as_deref() {
            _ if !self.present => Some("this host has no /dev/kvm".into()),
            None => Some("/dev/kvm is there, but offers no nested virtualization".into()),
            Some("Y" | "1") if self.usable => None,
            Some("Y" | "1") => Some("/dev/kvm cannot be opened by this user (the group kvm may)".into()),
            Some(value) => {
                Some(format!("KVM's nested virtualization is off (the module's parameter nested is {value})"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kvm(present: bool, usable: bool, nested: Option<&str>) -> Kvm {
        Kvm { usable, present, nested: nested.map(str::to_owned) }
    }

    #[test]
    fn nested_virtualization_decides() {
        for value in ["Y", "1"] {
            let (used, why) = Accel::Auto.decide(&kvm(true, true, Some(value)));
            assert_eq!(used, Acceleration::Kvm);
            assert!(why.is_some());
        }
        for (kvm, word) in [
            (kvm(true, true, None), "offers no nested"),
            (kvm(true, true, Some("N")), "parameter nested is N"),
            (kvm(true, false, Some("1")), "cannot be opened"),
        ] {
            for accel in [Accel::Auto, Accel::Kvm] {
                let (used, why) = accel.decide(&kvm);
                assert_eq!(used, Acceleration::Tcg);
                assert!(why.unwrap().contains(word));
            }
        }
    }

    #[test]
    fn a_host_without_kvm_is_worth_a_word_only_when_kvm_was_asked_for() {
        assert_eq!(Accel::Auto.decide(&kvm(false, false, None)), (Acceleration::Tcg, None));
        let (used, why) = Accel::Kvm.decide(&kvm(false, false, None));
        assert_eq!(used, Acceleration::Tcg);
        assert!(why.unwrap().contains("no /dev/kvm"));
    }

    #[test]
    fn emulation_asks_nobody() {
        assert_eq!(Accel::Tcg.decide(&kvm(true, true, Some("1"))), (Acceleration::Tcg, None));
    }
}
