//! The small guests of `tests/guests`: each reports its cases on the console.

use std::fs;

use anyhow::Result;
use xtask::bundle::Bundle;
use xtask::paths;

use crate::cases::Cases;
use crate::context::{is_tcg, Ctx};
use crate::scenario::Scenario;

/// Guests that hold a conversation or measure, and report no cases.
const WITHOUT_CASES: [&str; 2] = ["demo", "bench_exits"];

/// What a guest writes to its exit port when all cases passed is 0, and comes back as isa-debug-exit's status.
const ALL_PASSED: u8 = 1;

/// One scenario for each guest, and for each kind of memory mapping that a virtual machine can have.
pub(super) fn all() -> Vec<Scenario> {
    names()
        .into_iter()
        .filter(|name| !WITHOUT_CASES.contains(&name.as_str()))
        .flat_map(|name| {
            ["4K", "auto"].map(|page_size| {
                let guest = name.clone();
                Scenario::new(format!("guest_{name}_{page_size}"), move |ctx| report(ctx, &guest, page_size))
                    .limit(120)
            })
        })
        .collect()
}

/// The guests are the binaries of their crate.
fn names() -> Vec<String> {
    let bins = paths::workspace_root().join("tests/guests/src/bin");
    let mut names: Vec<String> = fs::read_dir(bins)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

fn report(ctx: &Ctx, guest: &str, page_size: &str) -> Result<Cases> {
    let machine = ctx.machine();
    let cmdline = if is_tcg(&machine) { "tcg" } else { "" };
    let config = format!(
        "[[vm]]\nname = \"{guest}\"\nmemory = \"64M\"\nkernel = \"{guest}\"\ncmdline = \"{cmdline}\"\n\
         page_size = \"{page_size}\"\nexit_port = 0xf4\non_reset = \"stop\"\n"
    );
    let bundle = Bundle::new(config).file_from(guest, &ctx.images.guest(guest))?;
    let outcome = ctx.boot(&machine, &bundle)?.end()?;
    let mut cases = Cases::reported_in(&outcome.log);
    let failed = cases.count(crate::cases::is_failure) > 0;
    cases.require(failed || outcome.status == Some(ALL_PASSED), || {
        format!("the run ended with {:?} instead of status {ALL_PASSED}", outcome.status)
    });
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_known() {
        assert!(!names().is_empty());
    }
}
