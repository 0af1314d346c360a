//! Decides what to do about what is missing.

use super::host::{Host, PackageManager, Rights};
use super::Component;

/// A component that is missing, and why it counts as missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) component: Component,
    pub(super) why: String,
}

/// One thing to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// `rustup target add`; if it fails, these packages are installed instead, if there are any.
    AddTarget { instead: Vec<&'static str> },
    /// Install packages by apt.
    Install(Vec<&'static str>),
    /// Download and unpack Linux, as a guest and with KVM.
    DownloadLinux,
}

/// What setup is going to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) missing: Vec<Missing>,
    pub(super) steps: Vec<Step>,
    /// What a person must do, because setup cannot: whole sentences.
    pub(super) by_hand: Vec<String>,
    /// Why there will be no Linux guest, if there cannot be one.
    pub(super) no_linux: Option<String>,
}

impl Plan {
    pub(super) fn make(needed: &[Component], host: &impl Host) -> Self {
        let mut plan = Self::default();
        for &component in needed {
            if let Some(why) = component.missing(host) {
                plan.missing.push(Missing { component, why });
            }
        }
        if plan.missing.is_empty() {
            return plan;
        }
        let manager = host.package_manager();
        if manager == Some(PackageManager::Apt) {
            plan.with_apt(host);
        } else {
            plan.without_apt(manager, host);
        }
        plan
    }

    fn lacks(&self, component: Component) -> bool {
        self.missing.iter().any(|missing| missing.component == component)
    }

    /// The packages of the missing components, each once.
    fn packages(&self, manager: PackageManager, except: Option<Component>) -> Vec<&'static str> {
        let mut packages = Vec::new();
        for missing in self.missing.iter().filter(|missing| Some(missing.component) != except) {
            for package in missing.component.packages(manager) {
                if !packages.contains(package) {
                    packages.push(*package);
                }
            }
        }
        packages
    }

    fn with_apt(&mut self, host: &impl Host) {
        let rustup = self.lacks(Component::Target) && host.has_program("rustup");
        let can_install = host.rights() != Rights::None;
        let install = self.packages(PackageManager::Apt, rustup.then_some(Component::Target));
        if rustup {
            let instead = if can_install {
                Component::Target.packages(PackageManager::Apt).to_vec()
            } else {
                Vec::new()
            };
            self.steps.push(Step::AddTarget { instead });
        }
        if !install.is_empty() {
            if can_install {
                self.steps.push(Step::Install(install));
            } else {
                let command = PackageManager::Apt.install_command(&install);
                self.by_hand.push(format!("this user cannot install packages; run: {command}"));
            }
        }
        if self.lacks(Component::Linux) || self.lacks(Component::Kvm) {
            self.steps.push(Step::DownloadLinux);
        }
    }

    fn without_apt(&mut self, manager: Option<PackageManager>, host: &impl Host) {
        let rustup = self.lacks(Component::Target) && host.has_program("rustup");
        if rustup {
            self.steps.push(Step::AddTarget { instead: Vec::new() });
        }
        let except = rustup.then_some(Component::Target);
        match manager {
            Some(manager) => {
                let packages = self.packages(manager, except);
                if !packages.is_empty() {
                    self.by_hand.push(format!("run: {}", manager.install_command(&packages)));
                }
            }
            None if self.missing.iter().any(|m| {
                Some(m.component) != except && !matches!(m.component, Component::Linux | Component::Kvm)
            }) =>
            {
                let commands: Vec<String> =
                    [PackageManager::Dnf, PackageManager::Pacman, PackageManager::Brew]
                        .iter()
                        .map(|manager| {
                            format!("`{}`", manager.install_command(&self.packages(*manager, except)))
                        })
                        .collect();
                self.by_hand.push(format!(
                    "no package manager was found here; elsewhere the packages are installed with {}",
                    commands.join(", ")
                ));
            }
            None => {}
        }
        if self.lacks(Component::Linux) {
            self.no_linux =
                Some("the Linux guest comes from Debian's packages, and there is no apt here".into());
        }
        if self.lacks(Component::Kvm) {
            self.by_hand.push("Linux with KVM comes from Debian's packages: there is no apt here".into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::guest::{KvmHost, Linux};
    use crate::toolchain::Compiler;

    /// A machine with nothing but a package manager and rustup, unless said otherwise.
    struct Fake {
        programs: Vec<&'static str>,
        files: Vec<&'static str>,
        compiler: Option<Compiler>,
        linux: bool,
        kvm: bool,
        manager: Option<PackageManager>,
        rights: Rights,
    }

    impl Default for Fake {
        fn default() -> Self {
            Self {
                programs: vec!["rustup"],
                files: vec![],
                compiler: None,
                linux: false,
                kvm: false,
                manager: Some(PackageManager::Apt),
                rights: Rights::Root,
            }
        }
    }

    impl Host for Fake {
        fn has_program(&self, name: &str) -> bool {
            self.programs.contains(&name)
        }
        fn exists(&self, path: &Path) -> bool {
            self.files.iter().any(|file| Path::new(file) == path)
        }
        fn compiler(&self) -> Option<Compiler> {
            self.compiler
        }
        fn has_uefi(&self) -> bool {
            self.exists(Path::new("/OVMF"))
        }
        fn has_mkimage(&self) -> bool {
            self.has_program("grub-mkimage")
        }
        fn linux(&self) -> Result<Linux, String> {
            let linux = Linux { kernel: "k".into(), busybox: "b".into() };
            self.linux.then_some(linux).ok_or_else(|| "it is not in the cache".into())
        }
        fn kvm(&self) -> Result<KvmHost, String> {
            let linux = self.linux()?;
            let kvm = KvmHost { linux, modules: vec!["m".into()] };
            self.kvm.then_some(kvm).ok_or_else(|| "a module is missing".into())
        }
        fn package_manager(&self) -> Option<PackageManager> {
            self.manager
        }
        fn rights(&self) -> Rights {
            self.rights
        }
        fn lists_are_stale(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_fresh_debian_gets_everything() {
        let plan = Plan::make(&Component::ALL, &Fake::default());
        assert_eq!(plan.missing.len(), 7);
        assert!(plan.by_hand.is_empty() && plan.no_linux.is_none());
        let [Step::AddTarget { instead }, Step::Install(packages), Step::DownloadLinux] = &plan.steps[..]
        else {
            panic!("{:?}", plan.steps);
        };
        assert_eq!(instead, &["rustc-web", "cargo-web", "rust-web-src", "lld-22"]);
        for package in [
            "qemu-system-x86",
            "seabios",
            "ovmf",
            "bochs",
            "grub-pc-bin",
            "grub-efi-amd64-bin",
            "mtools",
            "dnsmasq-base",
        ] {
            assert_eq!(packages.iter().filter(|p| **p == package).count(), 1, "{package}");
        }
        assert!(!packages.contains(&"rustc-web"));
    }

    #[test]
    fn nothing_is_done_where_nothing_is_missing() {
        let host = Fake {
            programs: vec!["qemu-system-x86_64", "bochs", "grub-mkimage", "xorriso", "mformat", "dnsmasq"],
            files: vec![
                "/OVMF",
                "/usr/share/bochs/BIOS-bochs-latest",
                "/usr/share/bochs/VGABIOS-lgpl-latest",
                "/usr/lib/grub/i386-pc",
                "/usr/lib/grub/x86_64-efi",
            ],
            compiler: Some(Compiler::Debian),
            linux: true,
            ..Fake::default()
        };
        assert_eq!(Plan::make(&Component::ALL, &host), Plan::default());
        let without_bios = Fake { files: vec!["/OVMF"], ..host };
        let plan = Plan::make(&[Component::Bochs], &without_bios);
        assert_eq!(plan.missing[0].why, "there is no /usr/share/bochs/BIOS-bochs-latest");
    }

    #[test]
    fn without_rustup_debians_compiler_is_taken() {
        let host = Fake { programs: vec![], ..Fake::default() };
        let plan = Plan::make(&[Component::Target], &host);
        assert_eq!(plan.steps, [Step::Install(vec!["rustc-web", "cargo-web", "rust-web-src", "lld-22"])]);
    }

    #[test]
    fn debians_compiler_has_a_linter_of_its_own() {
        let host = Fake { compiler: Some(Compiler::Debian), ..Fake::default() };
        let plan = Plan::make(&[Component::Target, Component::Clippy], &host);
        assert_eq!(plan.steps, [Step::Install(vec!["rust-web-clippy"])]);
        let rustup = Fake { compiler: Some(Compiler::WithTarget), ..Fake::default() };
        assert_eq!(Plan::make(&[Component::Clippy], &rustup), Plan::default());
    }

    #[test]
    fn who_may_not_install_is_told_the_command() {
        let host = Fake { rights: Rights::None, ..Fake::default() };
        let plan = Plan::make(&[Component::Target, Component::Qemu, Component::Linux], &host);
        assert_eq!(plan.steps, [Step::AddTarget { instead: vec![] }, Step::DownloadLinux]);
        assert_eq!(plan.by_hand.len(), 1);
        assert!(
            plan.by_hand[0]
                .ends_with("sudo apt-get install -y --no-install-recommends qemu-system-x86 seabios"),
            "{}",
            plan.by_hand[0]
        );
        let sudo = Fake { rights: Rights::Sudo, ..Fake::default() };
        assert_eq!(Plan::make(&[Component::Uefi], &sudo).steps, [Step::Install(vec!["ovmf"])]);
    }

    #[test]
    fn other_systems_get_the_names_of_their_packages() {
        for (manager, command) in [
            (PackageManager::Dnf, "sudo dnf install qemu-system-x86-core seabios-bin edk2-ovmf"),
            (PackageManager::Pacman, "sudo pacman -S --needed qemu-system-x86 seabios edk2-ovmf"),
            (PackageManager::Brew, "brew install qemu"),
        ] {
            let host = Fake { manager: Some(manager), ..Fake::default() };
            let plan =
                Plan::make(&[Component::Target, Component::Qemu, Component::Uefi, Component::Linux], &host);
            assert_eq!(plan.steps, [Step::AddTarget { instead: vec![] }]);
            assert_eq!(plan.by_hand, [format!("run: {command}")]);
            assert!(plan.no_linux.is_some());
        }
    }

    #[test]
    fn kvm_comes_with_linux_and_from_debian_only() {
        for linux in [false, true] {
            let plan = Plan::make(&[Component::Linux, Component::Kvm], &Fake { linux, ..Fake::default() });
            assert_eq!(plan.steps, [Step::DownloadLinux]);
        }
        let host = Fake { linux: true, kvm: true, ..Fake::default() };
        assert_eq!(Plan::make(&[Component::Kvm], &host), Plan::default());
        for manager in [Some(PackageManager::Brew), None] {
            let plan = Plan::make(&[Component::Kvm], &Fake { manager, ..Fake::default() });
            assert_eq!(plan.steps, []);
            assert_eq!(plan.by_hand, ["Linux with KVM comes from Debian's packages: there is no apt here"]);
        }
    }

    #[test]
    fn an_unknown_system_gets_all_the_names() {
        let host = Fake { manager: None, ..Fake::default() };
        let plan = Plan::make(&[Component::Qemu, Component::Linux], &host);
        for word in ["dnf install", "pacman -S", "brew install qemu"] {
            assert!(plan.by_hand[0].contains(word), "{}", plan.by_hand[0]);
        }
        let ready = Fake { manager: None, compiler: Some(Compiler::WithTarget), ..Fake::default() };
        let plan = Plan::make(&[Component::Target, Component::Linux], &ready);
        assert!(plan.by_hand.is_empty() && plan.steps.is_empty() && plan.no_linux.is_some());
    }
}
