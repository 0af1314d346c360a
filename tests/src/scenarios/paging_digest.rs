//! The paging differential: the guest `paging_digest` on a bare machine and under Umbra, direct and shadowed, on SVM and
//! VMX. Whatever all of them translate, they translate alike.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use xtask::emulator::{BochsCpu, Boot, Kind, Machine};

use super::guests::bundle;
use crate::cases::{is_failure, Case, Cases, Verdict};
use crate::context::{platform_word, Ctx};
use crate::scenario::{Need, Scenario};

/// The guest.
const GUEST: &str = "paging_digest";

/// How Umbra translates, as umbra.toml says it.
const DIRECT: &str = "mmu = \"direct\"";
const SHADOW: &str = "mmu = \"shadow\"";

/// How the masks begin under which QEMU's faults count: they lack P in the error code where a bit is reserved, and W where an
/// exchange finds nothing that it may read.
const IN_QEMU: &str = "reserved.p,exchange.w";

/// In QEMU all cases run, in the slower Bochs the first of each group.
pub(super) fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("paging_digest_qemu", in_qemu).limit(240),
        Scenario::new("paging_digest_bochs", in_bochs).needs(&[Need::Grub, Need::Bochs]).limit(600),
    ]
}

/// A run: its name, whether QEMU executes the instructions in it, and its digests by group and mask.
struct Run {
    name: String,
    in_qemu: bool,
    digests: BTreeMap<(String, String), String>,
}

fn in_qemu(ctx: &Ctx) -> Result<Cases> {
    let runs = [
        bare(ctx)?,
        under_umbra(ctx, "direct", &ctx.machine(), DIRECT, "long")?,
        under_umbra(ctx, "shadow", &ctx.machine(), SHADOW, "long")?,
    ];
    Ok(compared(&runs))
}

fn in_bochs(ctx: &Ctx) -> Result<Cases> {
    let mut runs = vec![bare(ctx)?];
    for (name, cpu, config) in [
        ("ryzen_direct", BochsCpu::Ryzen, DIRECT),
        ("ryzen_shadow", BochsCpu::Ryzen, SHADOW),
        ("skylake_direct", BochsCpu::SkylakeX, DIRECT),
        ("skylake_shadow", BochsCpu::SkylakeX, SHADOW),
        ("penryn_shadow", BochsCpu::Penryn, SHADOW),
    ] {
        runs.push(under_umbra(ctx, name, &ctx.bochs(cpu), config, "")?);
    }
    Ok(compared(&runs))
}

/// The guest in Umbra's place.
fn bare(ctx: &Ctx) -> Result<Run> {
    let machine = Machine {
        boot: Boot::Bare,
        umbra: ctx.images.guest(GUEST),
        dir: ctx.dir.join("bare"),
        ..ctx.machine()
    };
    run(ctx, "bare", &machine, DIRECT, "").context("bare")
}

fn under_umbra(ctx: &Ctx, name: &str, machine: &Machine, config: &str, words: &str) -> Result<Run> {
    let machine = Machine { dir: ctx.dir.join(name), ..machine.clone() };
    run(ctx, name, &machine, config, words).with_context(|| name.to_owned())
}

fn run(ctx: &Ctx, name: &str, machine: &Machine, config: &str, words: &str) -> Result<Run> {
    let shadow = if config == SHADOW { "shadow" } else { "" };
    let words = format!("{} {shadow} {words}", platform_word(machine));
    let log = ctx.boot(machine, &bundle(ctx, GUEST, &words, config)?)?.end()?.log;
    if let Some(why) = Cases::reported_in(&log).0.into_iter().find(|case| is_failure(&case.verdict)) {
        anyhow::bail!("the guest itself failed: {} {:?}", why.name, why.verdict);
    }
    Ok(Run { name: name.into(), in_qemu: machine.kind == Kind::Qemu, digests: digests_in(&log) })
}

/// Lines `digest GROUP HEX mask=MASK`.
fn digests_in(log: &str) -> BTreeMap<(String, String), String> {
    log.lines()
        .filter_map(|line| {
            let mut words = line.trim_end().strip_prefix("digest ")?.split(' ');
            let (group, digest, mask) = (words.next()?, words.next()?, words.next()?.strip_prefix("mask=")?);
            Some(((group.into(), mask.into()), digest.into()))
        })
        .collect()
}

/// One case for each group and mask that two runs or more have: all their digests are equal.
fn compared(runs: &[Run]) -> Cases {
    let mut all: BTreeMap<&(String, String), Vec<(&str, &str)>> = BTreeMap::new();
    for run in runs {
        for (key, digest) in &run.digests {
            if key.1.starts_with(IN_QEMU) || !run.in_qemu {
                all.entry(key).or_default().push((&run.name, digest));
            }
        }
    }
    let mut cases = Cases::default();
    for ((group, mask), digests) in all {
        let equal = digests.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let verdict = match digests.len() {
            1 => continue,
            _ if equal => Verdict::Passed,
            _ => Verdict::Failed(format!("the digests differ: {digests:?}")),
        };
        cases.0.push(Case { name: format!("{group}/mask={mask}"), verdict });
    }
    let compared = !cases.0.is_empty();
    cases.require(compared, || "no group was compared".into());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, in_qemu: bool, log: &str) -> Run {
        Run { name: name.into(), in_qemu, digests: digests_in(log) }
    }

    #[test]
    fn qemus_faults_count_under_the_mask_only() {
        let log = |exact: u32| format!("digest a {exact} mask=none\r\ndigest a 7 mask={IN_QEMU}\nok a\n");
        let runs = [run("bare", true, &log(1)), run("ryzen", false, &log(2)), run("penryn", false, &log(2))];
        assert_eq!(compared(&runs).count(|verdict| *verdict == Verdict::Passed), 2);
        let runs = [run("bare", true, &log(1)), run("ryzen", false, &log(2)), run("penryn", false, &log(3))];
        let cases = compared(&runs);
        assert_eq!((cases.0.len(), cases.count(is_failure)), (2, 1));
        let Verdict::Failed(why) = &cases.0[0].verdict else { panic!("{cases:?}") };
        assert!(why.contains("ryzen") && why.contains("penryn") && !why.contains("bare"), "{why}");
    }

    #[test]
    fn nothing_compared_is_a_failure() {
        assert_eq!(compared(&[run("bare", true, "digest a 11 mask=none\n")]).count(is_failure), 1);
    }
}
