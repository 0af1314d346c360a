//! The targets under libFuzzer, which is guided by the code they cover. The target is named by the environment, since the
//! arguments are libFuzzer's.
#![no_main]
#![allow(unsafe_code, missing_docs)] // What libFuzzer calls has a name that is not mangled.

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mmu_fuzz::Target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names the target");
    mmu_fuzz::target(&name).expect("FUZZ_TARGET is the name of a target")
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));
