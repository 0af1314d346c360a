//! `setup`: finds what is missing, says why it is needed, installs it.

mod apt;
mod component;
mod host;
mod linux;
mod plan;

use std::fs::{self, File, TryLockError};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use self::apt::Apt;
pub use self::component::Component;
use self::host::{Host, PackageManager, ThisHost};
use self::plan::{Plan, Step};
use crate::exec::CommandLine;
use crate::guest::{KvmHost, Linux};
use crate::toolchain::{self, Compiler};
use crate::{paths, say};

/// `rustup target add` downloads about 10 MB; a machine without a way to it must not wait for ever.
const RUSTUP_LIMIT: Duration = Duration::from_secs(180);

/// What is there after a setup.
#[derive(Clone, Debug)]
pub struct Ready {
    compiler: Option<Compiler>,
    /// The Linux guest, if it was asked for and this machine can have one.
    pub linux: Option<Linux>,
    kvm: Option<KvmHost>,
}

impl Ready {
    /// The compiler for the bare-metal target.
    pub fn compiler(&self) -> Result<Compiler> {
        self.compiler.context("no compiler for the bare-metal target was asked for")
    }

    /// Linux with KVM.
    pub fn kvm(&self) -> Result<&KvmHost> {
        self.kvm.as_ref().context("KVM was not asked for")
    }
}

/// Installs what of `needed` is missing, and says before what it does and why.
pub fn ensure(needed: &[Component]) -> Result<Ready> {
    let host = ThisHost;
    if !Plan::make(needed, &host).missing.is_empty() {
        let _lock = lock()?;
        // Asked again: another setup may have done it while this one waited.
        let plan = Plan::make(needed, &host);
        announce(&plan);
        execute(&plan, &host)?;
        verify(needed, &plan, &host)?;
    }
    let wants = |component| needed.contains(&component);
    Ok(Ready {
        compiler: wants(Component::Target).then(|| host.compiler()).flatten(),
        linux: wants(Component::Linux).then(|| host.linux().ok()).flatten(),
        kvm: wants(Component::Kvm).then(|| host.kvm().ok()).flatten(),
    })
}

/// The Linux guest in the cache, or why there is none.
pub fn linux_guest() -> Result<Linux, String> {
    linux::cached()
}

/// Whether this machine can have a Linux guest: it has one, or its apt knows the package.
pub fn linux_is_possible() -> bool {
    linux::cached().is_ok()
        || ThisHost.package_manager() == Some(PackageManager::Apt) && apt::knows(linux::KERNEL_METAPACKAGE)
}

/// `setup`: all components, or with `check` only a report.
pub fn setup(check: bool) -> Result<ExitCode> {
    if check {
        return Ok(report(&ThisHost));
    }
    let ready = ensure(&Component::ALL)?;
    say!("everything is there; the compiler is {}", ready.compiler()?.describe());
    Ok(ExitCode::SUCCESS)
}

/// Prints the state of each component; a failure if one is missing.
fn report(host: &impl Host) -> ExitCode {
    let plan = Plan::make(&Component::ALL, host);
    for component in Component::ALL {
        let (name, purpose) = component.describe();
        match plan.missing.iter().find(|missing| missing.component == component) {
            Some(missing) => println!("missing  {name}: {}; {purpose}", missing.why),
            None => println!("present  {name}"),
        }
    }
    for step in &plan.steps {
        println!("would    {}", describe(step));
    }
    for sentence in plan.by_hand.iter().chain(&plan.no_linux) {
        println!("note     {sentence}");
    }
    ExitCode::from(u8::from(!plan.missing.is_empty()))
}

fn describe(step: &Step) -> String {
    match step {
        Step::AddTarget { instead } if instead.is_empty() => {
            "run `rustup target add x86_64-unknown-none`".into()
        }
        Step::AddTarget { instead } => {
            let packages = instead.join(" ");
            format!("run `rustup target add x86_64-unknown-none`, or else install by apt: {packages}")
        }
        Step::Install(packages) => format!("install by apt: {}", packages.join(" ")),
        Step::DownloadLinux => {
            "download Debian's cloud kernel with its KVM and BusyBox into the cache (30 MB)".into()
        }
    }
}

fn announce(plan: &Plan) {
    for missing in &plan.missing {
        let (name, purpose) = missing.component.describe();
        say!("missing: {name} ({}); {purpose}", missing.why);
    }
    for step in &plan.steps {
        say!("next: {}", describe(step));
    }
}

fn execute(plan: &Plan, host: &impl Host) -> Result<()> {
    // Before anything is changed: with this missing, the rest would be of no use.
    if !plan.by_hand.is_empty() {
        bail!("{}", plan.by_hand.join("; "));
    }
    let apt = Apt::new(host);
    for step in &plan.steps {
        match step {
            Step::AddTarget { instead } => add_target(instead, &apt)?,
            Step::Install(packages) => apt.install(packages)?,
            Step::DownloadLinux => {
                let lacks_kvm = plan.missing.iter().any(|missing| missing.component == Component::Kvm);
                match linux::download(&apt) {
                    Err(error) if lacks_kvm => return Err(error.context("there is no Linux with KVM")),
                    Err(error) => say!("there will be no Linux guest: {error:#}"),
                    Ok(()) => {}
                }
            }
        }
    }
    if let Some(why) = &plan.no_linux {
        say!("{why}");
    }
    Ok(())
}

fn add_target(instead: &[&str], apt: &Apt) -> Result<()> {
    let added = CommandLine::new("rustup")
        .args(["target", "add", toolchain::BARE_METAL])
        .dir(paths::workspace_root())
        .run_within(RUSTUP_LIMIT);
    match added {
        Ok(()) if toolchain::target_is_installed() => Ok(()),
        Ok(()) => bail!("rustup has added the target, but the toolchain that runs here does not have it"),
        Err(error) if instead.is_empty() => Err(error.context(format!(
            "the bare-metal target cannot be installed; make `rustup target add {}` work, or on Debian run: {}",
            toolchain::BARE_METAL,
            PackageManager::Apt.install_command(&toolchain::DEBIAN_PACKAGES)
        ))),
        Err(error) => {
            say!("{error:#}; Debian's compiler is taken instead");
            apt.install(instead)
        }
    }
}

/// Looks again: an installation that changed nothing is an error here and not a riddle later.
fn verify(needed: &[Component], plan: &Plan, host: &impl Host) -> Result<()> {
    for &component in needed {
        // `run` has a guest of its own where there is no Linux.
        if component == Component::Linux || !plan.missing.iter().any(|missing| missing.component == component)
        {
            continue;
        }
        if let Some(why) = component.missing(host) {
            bail!("{} is still missing after its installation: {why}", component.describe().0);
        }
    }
    if needed.contains(&Component::Target) {
        if let Some(compiler) = host.compiler() {
            say!("the compiler is {}", compiler.describe());
        }
    }
    Ok(())
}

/// One setup at a time.
fn lock() -> Result<File> {
    let folder = paths::cache_dir()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            say!("another setup is running; waiting for it ({})", path.display());
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_described() {
        let packages = vec!["a", "b"];
        assert!(describe(&Step::AddTarget { instead: packages.clone() }).ends_with("install by apt: a b"));
        assert!(describe(&Step::AddTarget { instead: vec![] }).ends_with('`'));
        assert_eq!(describe(&Step::Install(packages)), "install by apt: a b");
    }

    #[test]
    fn what_a_person_must_do_comes_before_any_change() {
        let plan = Plan {
            steps: vec![Step::Install(vec!["umbra-no-such-package"])],
            by_hand: vec!["run: something".into()],
            ..Plan::default()
        };
        assert_eq!(execute(&plan, &ThisHost).unwrap_err().to_string(), "run: something");
    }
}
